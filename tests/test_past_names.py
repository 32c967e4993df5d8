"""Modules that a forward reaches past their names: through a list, a tuple, a dict or an object of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
KEPT: dict[str, Callable[[list[nn.Module]], Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda layers: dict(enumerate(layers)),
    "object": lambda layers: SimpleNamespace(layers=layers),
    "partial": lambda layers: [partial(layer) for layer in layers],
    "calls": lambda layers: [layer.__call__ for layer in layers],
    "forwards": lambda layers: [layer.forward for layer in layers],
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.lin(x)) + x


class Hidden(nn.Module):
    """Three layers, called through a plain attribute."""

    def __init__(self, kept: str = "list", layer: Callable[[], nn.Module] = lambda: nn.Linear(4, 4)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = layer(), layer(), layer()
        self.order = KEPT[kept]([self.a, self.b, self.c])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = self.order
        if isinstance(order, SimpleNamespace):
            order = order.layers
        for layer in order.values() if isinstance(order, dict) else order:
            x = torch.tanh(layer(x))
        return x


def without_b(model: Hidden, between: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.tanh(model.c(between(torch.tanh(model.a(X))))).detach()


@pytest.mark.parametrize("kept", ["list", "tuple", "dict", "object", "partial"])
@pytest.mark.parametrize("check", [True, False])
def test_what_takes_its_place_is_called(kept: str, check: bool) -> None:
    for copy in (True, False) if kept == "list" else (True,):
        model = Hidden(kept)
        expected = without_b(model, lambda x: torch.tanh(nn.functional.relu6(x)))
        net = tt.replace(model, X, "b", nn.ReLU6(), check=check, copy=copy)
        assert torch.equal(net(X), expected)
        assert torch.equal(tt.apply(Hidden(kept), X, tt.history(net))(X), expected)
        assert not any("b." in name for name in net.state_dict())
        model = Hidden(kept)
        expected = without_b(model, torch.tanh)
        net = tt.remove(model, X, "b", check=check, copy=copy)
        assert torch.equal(net(X), expected)
        assert torch.equal(tt.apply(Hidden(kept), X, tt.history(net))(X), expected)


@pytest.mark.parametrize("kept", ["calls", "forwards"])
@pytest.mark.parametrize("check", [True, False])
def test_bound_methods_are_refused(kept: str, check: bool) -> None:
    with pytest.raises(tt.EditError, match="would go on calling it"):
        tt.replace(Hidden(kept), X, "b", nn.ReLU6(), check=check)
    with pytest.raises(tt.TorchTrimError, match=r"would go on calling it|never called"):
        tt.remove(Hidden(kept), X, "b", check=check)


@pytest.mark.parametrize("check", [True, False])
def test_a_module_inside_is_opened_and_so_is_what_calls_it(check: bool) -> None:
    model = Hidden(layer=Block)
    lin, six = model.b.lin, nn.functional.relu6
    net = tt.replace(model, X, "b:relu", nn.ReLU6(), check=check)
    assert torch.equal(net(X), without_b(model, lambda x: torch.tanh(six(lin(x)) + x)))
    net = tt.remove(model, X, "b:relu", check=check)
    assert torch.equal(net(X), without_b(model, lambda x: torch.tanh(lin(x) + x)))
    net = tt.insert(model, X, nn.ReLU6(), after="b.lin", check=check)
    assert torch.equal(net(X), without_b(model, lambda x: torch.tanh(six(lin(x)).relu() + x)))


@pytest.mark.parametrize("check", [True, False])
def test_a_list_that_the_forward_does_not_use_opens_nothing(check: bool) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.taps = [self.b]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))  # type: ignore[no-any-return]

    net = tt.replace(Listed(), X, "b", nn.Identity(), check=check)
    assert type(net) is Listed


@pytest.mark.parametrize("check", [True, False])
def test_a_batch_norm_and_a_head(check: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm, self.fc = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)
            self.order = [self.lin, self.norm, self.fc]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.order:
                x = layer(x)
            return x

    model = Net().eval()
    nn.init.uniform_(model.norm.weight, 1, 2)
    fused = tt.fuse_batchnorm(model, X, check=check)
    torch.testing.assert_close(fused(X), model(X))
    headed = tt.attach_head(model, X, 5, check=check)
    assert torch.equal(headed(X), headed.get_submodule("fc")(model.norm(model.lin(X))))


def test_elements_stay_where_nothing_is_compared() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.scale = [1.0, 2.0, 3.0, 4.0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, block in enumerate(self.blocks):
                x = x + self.scale[index] * block(x)
            return x

    model = Scaled()
    nets = [tt.remove(model, X, "blocks.0", check=check) for check in (True, False)]
    assert torch.equal(nets[0](X), nets[1](X))
    assert isinstance(nets[1].get_submodule("blocks.0"), nn.Identity)


@pytest.mark.parametrize("check", [True, False])
def test_elements_of_a_sequential_that_is_indexed(check: bool) -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, layer in enumerate(self.features):
                x = (index + 1) * layer(x)
            return x

    model = Indexed()
    net = tt.remove(model, X, "features.1", check=check)
    x = 3 * model.features[2](2 * model.features[0](X))
    assert torch.equal(net(X), 4 * model.features[3](x))


def test_a_fused_kernel_reads_no_weights_of_what_was_replaced() -> None:
    class Tanh(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x))

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    net = tt.replace(model, x, "layers.*.linear2", Tanh(12, 8))
    with torch.no_grad():
        fast = net(x)
    torch.testing.assert_close(fast, net(x))
    net = tt.replace(model, x, "layers.1.linear2", nn.Sequential(nn.Linear(12, 8), nn.Tanh()))
    with torch.no_grad():
        assert net(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 4 + [True]])).isfinite().any()
