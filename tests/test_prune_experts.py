"""Mixtures of experts whose rows are multiplied in groups: experts stay, and all of them get narrower alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import torchtrim as tt
from torchtrim.channels.blank import grouped_product
from torchtrim.graph.macs import macs_of


class Experts(nn.Module):
    """Each row goes through the one of 4 experts that its router chooses, as `transformers` computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim = 4, 16
        self.router = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 16, 48))
        self.down = nn.Parameter(torch.randn(4, 24, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        chosen, order = chosen.sort()
        counts = torch.histc(chosen.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        gate, up = functional.grouped_mm(x[order], self.up, offs=offsets).chunk(2, -1)
        made = functional.grouped_mm(gate.relu() * up, self.down, offs=offsets)
        return (made * weights[order, None])[order.argsort()]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.experts, self.head = nn.Linear(6, 16), Experts(), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(x + self.experts(x))


def test_experts_get_narrower_alike() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(40, 6)
    assert {int(each) for each in net.experts.router(net.stem(x)).argmax(1)} == {0, 1, 2, 3}
    narrow = tt.prune_channels(net, x, 0.5)
    experts = narrow.experts
    assert (tuple(experts.up.shape), tuple(experts.down.shape)) == ((4, 8, 24), (4, 12, 8))
    assert experts.router.out_features == experts.num_experts == 4
    assert experts.hidden_dim == 8
    twin = copy.deepcopy(net)
    lost = tt.history(narrow).edits[-1].narrowed
    with torch.no_grad():
        twin.stem.weight[list(lost["stem.weight"]["0"])] = 0
        twin.stem.bias[list(lost["stem.bias"]["0"])] = 0
        twin.experts.down[:, list(lost["experts.down"]["1"])] = 0
        twin.experts.down[:, :, list(lost["experts.down"]["2"])] = 0
    torch.testing.assert_close(narrow(x), twin(x), atol=1e-4, rtol=1e-4)
    narrow(x).sum().backward()
    assert experts.up.grad is not None
    assert tuple(experts.up.grad.shape) == tuple(experts.up.shape)


def test_multiply_accumulates_of_groups() -> None:
    rows, matrices = torch.zeros(10, 16), torch.zeros(4, 16, 24)
    offsets = torch.zeros(4, dtype=torch.int32)
    made = grouped_product(rows, matrices, offsets)
    assert tuple(made.shape) == (10, 24)
    op = torch.ops.aten._grouped_mm.default
    assert macs_of(op, (rows, matrices), {}, made) == 10 * 16 * 24
    assert macs_of(op, (rows.T, rows), {}, torch.zeros(4, 16, 16)) == 10 * 16 * 16
    with pytest.raises(RuntimeError, match="rows of 15"):
        grouped_product(torch.zeros(10, 15), matrices, offsets)
    with pytest.raises(RuntimeError, match="3 groups, and 4 matrices"):
        grouped_product(rows, matrices, offsets[1:])
    with pytest.raises(RuntimeError, match="16 bytes"):
        grouped_product(torch.zeros(10, 18), torch.zeros(4, 18, 24), offsets)


def test_experts_that_no_kernel_would_take_are_left_alone() -> None:
    torch.manual_seed(0)
    net, x = Net().eval().bfloat16(), torch.randn(40, 6).bfloat16()
    narrow = tt.prune_channels(net, x, 0.5)  # 12 of 24 are no multiple of 16 bytes
    assert tuple(narrow.experts.down.shape) == (4, 24, 16)
    told = " ".join(tt.history(narrow).entries[-1].notes)
    assert "products of groups need widths of 16 bytes (a larger round_to gives such)" in told
    assert tuple(tt.prune_channels(net, x, 0.5, round_to=16).experts.down.shape) == (4, 16, 8)


def test_groups_that_are_computed_are_as_many_as_there_are_experts() -> None:
    class Counted(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            counts = (self.experts.router(x) > 0).sum(0).clamp(max=len(x) // 4)
            made = functional.grouped_mm(x, self.experts.up, offs=counts.cumsum(0, dtype=torch.int32))
            return self.head(x + made[:, :16].nan_to_num().clamp(-1, 1))

    net = Counted().eval()
    narrow = tt.prune_channels(net, torch.randn(40, 6), 0.5, check=False)
    assert narrow.experts.router.out_features == 4
    told = " ".join(tt.history(narrow).entries[-1].notes)
    assert "left alone: experts.router: it runs together with what cannot be narrowed at `_grouped_mm`" in told


def test_experts_in_one_matrix_are_compared_with_all_of_them_ignored() -> None:
    class Flat(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(self.down.detach().flatten(0, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen, order = self.router(x).argmax(-1).sort()
            counts = torch.histc(chosen.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
            offsets = counts.cumsum(0, dtype=torch.int32)
            gate, up = functional.grouped_mm(x[order], self.up, offs=offsets).chunk(2, -1)
            down = self.down.view(self.num_experts, -1, x.shape[1])
            return functional.grouped_mm(gate.relu() * up, down, offs=offsets)[order.argsort()]

    net, x = Net().eval(), torch.randn(40, 6)
    net.experts = Flat().eval()
    narrow = tt.prune_channels(net, x, 0.5)
    assert tuple(narrow.experts.down.shape) == (4 * 12, 8)
    assert any(line.startswith("eval") and "equal" in line for line in tt.history(narrow).entries[-1].checked)


def test_a_model_of_experts_is_counted_as_it_runs() -> None:
    each_row = 6 * 16 + 16 * 4 + 16 * 3 + 16 * 48 + 24 * 16
    assert tt.summary(Net().eval(), torch.randn(40, 6)).macs == each_row
