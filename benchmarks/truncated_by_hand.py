"""Five models cut in the middle by hand: what a user would write without torchtrim; `train_truth.py` compares.

Each forward is that of the original down to one layer, written out; the layers are the original's own. What comes after
is taken out, so that nothing is computed, drawn at random or counted that the result does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torchvision
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, where it is cut, its input, and the same cut by hand.

    Attributes:
        build: Makes the model, with random weights.
        after: The address that `tt.cut` is given.
        size: Height and width of its pictures.
        by_hand: The truncated forward as a module, from the original.
        channels_last: Whether the features are (N, H, W, C).
    """

    build: Callable[[], nn.Module]
    after: str
    size: int
    by_hand: Callable[[nn.Module], nn.Module]
    channels_last: bool = False


class EfficientNetByHand(nn.Module):
    """timm's EfficientNet to the activation of the second block of stage 4, after its depthwise convolution."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = net.conv_stem, net.bn1
        self.before = nn.Sequential(*net.blocks[:4], net.blocks[4][0])
        block = net.blocks[4][1]
        self.conv_pw, self.bn_pw, self.conv_dw, self.bn_dw = block.conv_pw, block.bn1, block.conv_dw, block.bn2

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.bn1(self.conv_stem(x)))
        return self.bn_dw(self.conv_dw(self.bn_pw(self.conv_pw(x))))


class SwinByHand(nn.Module):
    """torchvision's Swin to the attention branch's sum in the third block of stage 3."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(*net.features[:5], *net.features[5][:2])
        block = net.features[5][2]
        self.norm, self.attention, self.depth = block.norm1, block.attn, block.stochastic_depth

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return x + self.depth(self.attention(self.norm(x)))


class ConvNextByHand(nn.Module):
    """timm's ConvNeXt to the MLP of the fourth block of stage 3."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        stage = net.stages[2]
        self.before = nn.Sequential(net.stem, *net.stages[:2], stage.downsample, *stage.blocks[:3])
        block = stage.blocks[3]
        self.conv_dw, self.norm, self.mlp = block.conv_dw, block.norm, block.mlp
        self.in_conv_form = block.use_conv_mlp

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_dw(self.before(x))
        return self.mlp(self.norm(x if self.in_conv_form else x.permute(0, 2, 3, 1)))


class GhostNetByHand(nn.Module):
    """timm's GhostNet to the first ghost module of the third block of stage 6."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(net.conv_stem, net.bn1, net.act1)
        self.before = nn.Sequential(*net.blocks[:6], *net.blocks[6][:2])
        self.ghost = net.blocks[6][2].ghost1

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost(self.before(self.stem(x)))


class InceptionByHand(nn.Module):
    """torchvision's Inception 3 to the 7x7 branch of Mixed_6c; the auxiliary head comes later and is gone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(
            net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.maxpool1, net.Conv2d_3b_1x1, net.Conv2d_4a_3x3,
            net.maxpool2, net.Mixed_5b, net.Mixed_5c, net.Mixed_5d, net.Mixed_6a, net.Mixed_6b,
        )  # fmt: skip
        mixed = net.Mixed_6c
        self.branch = nn.Sequential(mixed.branch7x7_1, mixed.branch7x7_2, mixed.branch7x7_3)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.before(x))


CASES = {
    "timm efficientnet_b0": Case(
        lambda: timm.create_model("efficientnet_b0", drop_path_rate=0.2), "blocks.4.1.bn2", 128, EfficientNetByHand
    ),
    "torchvision swin_t": Case(
        lambda: torchvision.models.swin_t(weights=None), "features.5.2:add#0", 128, SwinByHand, channels_last=True
    ),
    "timm convnext_atto": Case(
        lambda: timm.create_model("convnext_atto", drop_path_rate=0.2, ls_init_value=0.5),
        "stages.2.blocks.3.mlp",
        128,
        ConvNextByHand,
    ),
    "timm ghostnet_100": Case(
        lambda: timm.create_model("ghostnet_100", drop_rate=0.2), "blocks.6.2.ghost1", 128, GhostNetByHand
    ),
    "torchvision inception_v3": Case(
        lambda: torchvision.models.inception_v3(weights=None, init_weights=True),
        "Mixed_6c.branch7x7_3",
        128,
        InceptionByHand,
    ),
}
