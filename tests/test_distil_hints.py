"""Hints: places, projections, sizes that differ, lining up through the history, and errors that name the edit."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

import torchtrim as tt
from torchtrim.train.hint_joint import Joint

X = torch.randn(2, 3, 32, 32)


class Wide(nn.Module):
    """A small network with a residual sum, layers in place, and one layer that is called twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.conv(x)
        y += x
        y = self.act(y)
        return self.head(y.mean((2, 3)))


class Tokens(nn.Module):
    """Patches, a class token, blocks of one width."""

    def __init__(self, width: int, patch: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in range(blocks))
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(x[:, 0])


class Last(nn.Module):
    """Channels last, as in Swin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.linear(x.permute(0, 2, 3, 1))).mean((1, 2)))


def joint(distiller: tt.Distiller, name: str) -> Joint:
    return next(each for each in distiller._hints.joints if each.name == name)


def value_at(model: nn.Module, path: str, x: torch.Tensor = X) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *args: found.append(args[2].clone()))
    model(x)
    handle.remove()
    return found[-1]


def test_a_hint_is_fitnets() -> None:
    student, teacher = Wide(8).eval(), Wide(12).eval()
    distiller = tt.Distiller(student, teacher, hints={"conv": "conv"}, example_inputs=X)
    (projection,) = distiller.projections.values()
    assert isinstance(projection, nn.Conv2d) and projection.kernel_size == (1, 1)
    ours, theirs = value_at(student, "conv"), value_at(teacher, "conv")
    assert torch.allclose(distiller(X).parts["conv"], F.mse_loss(projection(ours), theirs), atol=1e-6)
    normal = tt.Distiller(Wide(12).eval(), teacher, hints=[tt.Hint("conv", normalize=True)], example_inputs=X)
    ours = value_at(normal.student, "conv")
    expected = F.mse_loss(F.layer_norm(ours, ours.shape[1:]), F.layer_norm(theirs, theirs.shape[1:]))
    assert torch.allclose(normal(X).parts["conv"], expected, atol=1e-6)
    assert not list(normal.projections.parameters())


def test_values_that_are_overwritten_are_the_ones_computed_there() -> None:
    student, teacher = Wide(8).eval(), Wide(8).eval()
    places = ["norm", "conv", ":add", "act#0", "act#1"]
    distiller = tt.Distiller(student, teacher, hints=places, example_inputs=X)
    parts = distiller(X).parts
    for place in places[:2]:
        expected = F.mse_loss(value_at(student, place), value_at(teacher, place))
        assert torch.allclose(parts[place], expected, atol=1e-6), place
    cut = [tt.cut(model, X, after=":add")(X) for model in (student, teacher)]
    assert torch.allclose(parts[":add"], F.mse_loss(*cut), atol=1e-6)
    last = [value_at(model, "act") for model in (student, teacher)]
    assert torch.allclose(parts["act#1"], F.mse_loss(*last), atol=1e-6)
    assert not torch.allclose(parts["act#0"], parts["act#1"])
    distiller(X).loss.backward()
    assert student.stem.weight.grad is not None


def test_gradients_flow_through_hints_alone() -> None:
    student, teacher = Wide(8), Wide(12)
    hints = {"conv": "conv", "a": tt.Hint("conv", loss="attention"), "r": tt.Hint("conv", loss="relational")}
    distiller = tt.Distiller(student, teacher, alpha=0, hints=hints, example_inputs=X, weights={"hard": 0})
    result = distiller(torch.randn(4, 3, 32, 32))
    assert list(result.parts) == ["conv", "a", "r"]
    result.loss.backward()
    assert all(
        p.grad is not None for p in (student.stem.weight, student.conv.weight, *distiller.projections.parameters())
    )
    assert student.head.weight.grad is None and all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("make", "place", "form", "layer"),
    [
        (Wide, "conv", "map", nn.Conv2d),
        (Tokens, "blocks.1", "tokens", nn.Linear),
        (Last, "norm", "map", nn.Conv2d),
        (lambda width: nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, 5)), "1", "flat",
         nn.Linear),
        (
            lambda width: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, width, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                                        nn.Linear(width, 5)),
            "1",
            "map",
            nn.Conv1d,
        ),
        (
            lambda width: nn.Sequential(nn.Unflatten(2, (2, 16)), nn.Conv3d(3, width, 2), nn.AdaptiveAvgPool3d(1),
                                        nn.Flatten(), nn.Linear(width, 5)),
            "1",
            "map",
            nn.Conv3d,
        ),
    ],
)  # fmt: skip
def test_projections_are_found_on_the_right_axis(make: Any, place: str, form: str, layer: type[nn.Module]) -> None:
    student, teacher = make(6), make(10)
    distiller = tt.Distiller(student, teacher, hints={place: place}, example_inputs=X)
    (projection,) = distiller.projections.values()
    assert type(projection) is layer and projection.weight.shape[:2] == (10, 6)
    assert joint(distiller, place).student.form == form and joint(distiller, place).student.width == 6
    distiller(X).loss.backward()
    assert projection.weight.grad is not None


def test_sizes_that_differ_are_pooled() -> None:
    student, teacher = Wide(8).eval(), nn.Sequential(nn.Upsample(scale_factor=2), Wide(8)).eval()
    hints = {"conv": "1.conv", "a": tt.Hint("conv", "1.conv", loss="attention")}
    distiller = tt.Distiller(student, teacher, hints=hints, example_inputs=X)
    ours, theirs = value_at(student, "conv"), value_at(teacher, "1.conv")
    assert theirs.shape[-1] == 2 * ours.shape[-1]
    assert torch.allclose(distiller(X).parts["conv"], F.mse_loss(ours, F.avg_pool2d(theirs, 2)), atol=1e-6)
    other = torch.randn(3, 3, 48, 40)  # another size than that of the examples
    assert torch.isfinite(distiller(other).loss)


def test_token_counts_that_differ() -> None:
    student, teacher = Tokens(8, patch=16), Tokens(8, patch=8)
    with pytest.raises(tt.InputError, match=r"5 tokens in the student, 17 in the teacher.*resize=True"):
        tt.Distiller(student, teacher, hints=["blocks.1"], example_inputs=X)
    resized = tt.Distiller(student, teacher, hints=[tt.Hint("blocks.1", resize=True)], example_inputs=X)
    assert torch.isfinite(resized(X).parts["blocks.1"])
    relations = tt.Distiller(student, teacher, hints=[tt.Hint("blocks.1", loss="relational")], example_inputs=X)
    assert torch.isfinite(relations(X).loss)


def test_values_of_different_forms() -> None:
    with pytest.raises(tt.InputError, match=r"not of one form.*map \[2, 8, 16, 16\].*tokens \[2, 17, 8\]"):
        tt.Distiller(Wide(8), Tokens(8), hints={"conv": "blocks.1"}, example_inputs=X)
    own = tt.Hint("conv", "blocks.1", loss=lambda a, b: F.mse_loss(a.mean((2, 3)), b.mean(1)))
    assert torch.isfinite(tt.Distiller(Wide(8), Tokens(8), hints=[own], example_inputs=X)(X).loss)
    with pytest.raises(tt.InputError, match="no attention map"):
        tt.Distiller(Wide(8), Wide(8), hints=[tt.Hint("head", loss="attention")], example_inputs=X)
    with pytest.raises(tt.InputError, match="project=False"):
        tt.Distiller(Wide(8), Wide(12), hints=[tt.Hint("conv", project=False)], example_inputs=X)
    with pytest.raises(tt.InputError, match=r"no such loss for a hint.*'attention'"):
        tt.Hint("conv", loss="attentoin")
    with pytest.raises(tt.InputError, match="1 or -1"):
        tt.Hint("conv", channel_axis=2)


def test_a_loss_with_weights_is_trained_along() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(self.scale * student, teacher)

    distiller = tt.Distiller(Wide(8), Wide(8), hints=[tt.Hint("conv", loss=Learned())], example_inputs=X)
    distiller(X).loss.backward()
    (scale,) = distiller.projections.parameters()
    assert scale.grad is not None and list(distiller.projections) == ["conv_loss"]
    projected = tt.Distiller(Wide(8), Wide(12), hints=[tt.Hint("conv", loss=F.l1_loss, project=True)], example_inputs=X)
    assert torch.isfinite(projected(X).loss)


def test_names_that_a_module_dict_has_itself() -> None:
    class Keys(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.keys = nn.Linear(4, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.keys(x)[:, :2]

    student, teacher, x = Keys(3), Keys(5), torch.zeros(2, 4)
    assert [*tt.Distiller(student, teacher, hints={"keys": "keys"}, example_inputs=x).projections] == ["keys_"]
    two = {"a.b": tt.Hint("keys"), "a_b": tt.Hint("keys")}
    assert len(tt.Distiller(student, teacher, hints=two, example_inputs=x).projections) == 2


def test_paths_that_do_not_exist() -> None:
    with pytest.raises(tt.PathError, match=r"conw: the student has no such place.*'conv'"):
        tt.Distiller(Wide(8), Wide(8), hints={"conw": "conv"}, example_inputs=X)
    with pytest.raises(tt.PathError, match=r"conw: the teacher has no such place.*'conv'"):
        tt.Distiller(Wide(8), Wide(8), hints={"conv": "conw"}, example_inputs=X)
    with pytest.raises(tt.PathError, match=r"act: .*several times.*'act#0', 'act#1'"):
        tt.Distiller(Wide(8), Wide(8), hints=["act"], example_inputs=X)
    with pytest.raises(tt.PathError, match=r":sub: no such call.*:add"):
        tt.Distiller(Wide(8), Wide(8), hints=[":sub"], example_inputs=X)
    with pytest.raises(tt.PathError, match="act#7"):
        tt.Distiller(Wide(8), Wide(8), hints=["act#7"], example_inputs=X)
    with pytest.raises(tt.PathError, match="not an address"):
        tt.Distiller(Wide(8), Wide(8), hints=["a:b:c"], example_inputs=X)
    unused = Wide(8)
    unused.spare = nn.Linear(2, 2)
    with pytest.raises(tt.PathError, match="not called"):
        tt.Distiller(unused, Wide(8), hints={"spare": "conv"}, example_inputs=X)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=7).eval()


def test_paths_that_an_edit_removed(original: nn.Module) -> None:
    shorter = tt.remove(original, X, ["layer2.1", "layer3.1"], check=False)
    student = tt.prune_channels(shorter, X, 0.5, check=False)
    for path in ("layer3.1", "layer3.1.conv1", "layer3.1:add"):
        with pytest.raises(tt.PathError, match=r"the student has no such place any more: .*edit 1, remove\(layer"):
            tt.Distiller(student, original, hints=[path])
    cut = tt.attach_head(tt.cut(original, X, after="layer3", check=False), X, num_classes=7, check=False)
    with pytest.raises(tt.PathError, match=r"layer4.*went away with edit 1, cut\(after='layer3'\)"):
        tt.Distiller(cut, original, hints=["layer4"])


def test_auto_lines_a_trimmed_model_up_with_its_original(original: nn.Module) -> None:
    student = tt.prune_channels(tt.remove(original, X, ["layer3.1"], check=False), X, 0.5, check=False)
    distiller = tt.Distiller(student, original, hints="auto")
    assert list(distiller.hints) == ["layer1", "layer2", "layer3", "layer4"]
    assert [layer.weight.shape[:2] for layer in distiller.projections.values()] == [
        (64, 32), (128, 64), (256, 128), (512, 256)
    ]  # fmt: skip
    assert "layer3 [2, 128, 2, 2]" in str(distiller.terms)
    distiller(X, torch.tensor([0, 6])).loss.backward()
    assert all(p.grad is not None for p in distiller.parameters())

    cut = tt.attach_head(tt.cut(original, X, after="layer3", check=False), X, num_classes=3, check=False)
    distiller = tt.Distiller(cut, original, hints="auto", alpha=0)
    assert list(distiller.hints) == ["bn1", "layer1", "layer2", "layer3"]
    assert torch.isfinite(distiller(X, torch.tensor([0, 2])).loss)


def test_auto_lines_up_an_adapter_with_what_it_stands_for(original: nn.Module) -> None:
    student = tt.remove(original, X, "layer2", adapter="auto", check=False)
    distiller = tt.Distiller(student, original, hints="auto")
    assert list(distiller.hints) == ["layer1", "layer2", "layer3", "layer4"]
    with pytest.raises(tt.PathError, match=r"layer2\.1: .*went away with edit 1"):
        tt.Distiller(student, original, hints=["layer2.1"])
    gone = tt.remove(original, X, ["layer1.1", "layer2.1"], check=False)
    names = list(tt.Distiller(gone, original, hints="auto").hints)
    assert names == ["layer1", "layer2", "layer3", "layer4"]


def test_auto_for_other_kinds_of_models() -> None:
    tokens = Tokens(8, blocks=6)
    assert list(tt.Distiller(copy.deepcopy(tokens), tokens, hints="auto", example_inputs=X).hints) == [
        "blocks.1", "blocks.3", "blocks.5"
    ]  # fmt: skip
    flat = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 2))
    hints = tt.Distiller(copy.deepcopy(flat), flat, hints="auto", example_inputs=torch.zeros(2, 8)).hints
    assert list(hints) == ["2", "4"]
    with pytest.raises(tt.SelectionError, match="no places in common"):
        tt.Distiller(Wide(8), nn.Sequential(Wide(8)), hints="auto", example_inputs=X)


def test_a_hint_of_no_weight_is_left_out() -> None:
    distiller = tt.Distiller(
        Wide(8), Wide(12), hints={"conv": "conv", "stem": "stem"}, weights={"stem": 0, "conv": 3}, example_inputs=X
    )
    result = distiller(X)
    assert list(distiller.hints) == ["conv"] and len(distiller.projections) == 1
    assert torch.allclose(result.loss, 0.5 * result.parts["soft"] + 3 * result.parts["conv"])


def test_probing_leaves_both_as_they_were() -> None:
    student, teacher = Wide(8).train(), Wide(12).train()
    before = [copy.deepcopy(model.state_dict()) for model in (student, teacher)]
    called: list[int] = []
    student.conv.register_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    tt.Distiller(student, teacher, hints=[":add"], weights={"soft": 1}, task="values", example_inputs=X)
    tt.Distiller(Wide(8), Wide(8), hints=["conv"], example_inputs=X)
    assert not called and student.training and teacher.training
    for model, was in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in model.state_dict().items())
    torch.set_rng_state(state)


def test_a_wrapped_student_has_no_projections() -> None:
    with pytest.raises(tt.ModelError, match="wrapper around the distiller"):
        tt.Distiller(nn.DataParallel(Wide(8)), Wide(12), hints=["conv"], example_inputs=X)
    assert torch.isfinite(tt.Distiller(nn.DataParallel(Wide(8)), Wide(8), hints=["conv"], example_inputs=X)(X).loss)


def test_a_hint_inside_of_reentrant_checkpointing_is_refused() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = (
                nn.Linear(8, 8),
                nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
                nn.Linear(8, 3),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.block, self.stem(x), use_reentrant=True))

    x = torch.randn(4, 8)
    student, teacher = Checkpointed(), Checkpointed()
    distiller = tt.Distiller(student, teacher, hints=["block.0"], example_inputs=x)
    with pytest.raises(tt.ModelError, match="no gradients there"):
        distiller(x)
    with torch.no_grad():  # measuring asks for none
        assert distiller(x).loss.isfinite()
    tt.Distiller(student, teacher, hints=["stem"], example_inputs=x)(x).loss.backward()


@pytest.mark.parametrize("place", ["conv", ":add"])
def test_nothing_is_kept_between_steps(place: str) -> None:
    class Sum(Wide):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(self.stem(x)) + 1.0
            return self.head(y.mean((2, 3)))

    distiller = tt.Distiller(Sum(), Sum(), hints=[place], example_inputs=X)
    distiller(X)
    gc.collect()
    gc.disable()
    try:
        with distiller._hints.watching(distiller.student) as capture:
            distiller.student(X)
        kept = [weakref.ref(value) for value in capture.values.values()]
        del capture
        assert len(kept) == 1 and kept[0]() is None
    finally:
        gc.enable()


class Sequences(nn.Module):
    """Tokens as torch's own layers take them by default: places first, (L, N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x).transpose(0, 1)).mean(0))


@pytest.mark.parametrize("options", [{"loss": "relational"}, {"loss": "attention"}, {"normalize": True}])
def test_rows_that_are_no_samples_are_refused(options: dict[str, Any]) -> None:
    for rows in (1, 5):
        with pytest.raises(tt.InputError, match="not that of the samples"):
            tt.Distiller(
                Sequences(), Sequences(), hints=[tt.Hint("block", **options)], example_inputs=torch.randn(rows, 7, 4)
            )
    tt.Distiller(Sequences(), Sequences(), hints=["block"], example_inputs=torch.randn(2, 7, 4))


def test_a_function_that_train_mode_calls_more_often_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                x = x + 0.01
            return self.b(self.a(x) + x)

    x = torch.randn(4, 8)
    distiller = tt.Distiller(Noisy(), Noisy(), hints=[":add#0"], example_inputs=x)
    with pytest.raises(tt.ModelError, match="more or less often"):
        distiller(x)
    distiller.eval()
    assert distiller(x).loss.isfinite()
