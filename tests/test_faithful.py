"""What a list of calls cannot hold is refused or left closed, never dropped; and failures change nothing."""

from __future__ import annotations

import copy
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import torchtrim as tt
from torchtrim.graph.check import Mismatch, Side, compare
from torchtrim.graph.inputs import Inputs

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))


class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return -gradient


class Room(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Room, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self, x))


def without_gradients(room: Room, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return room.a(x)


def in_full_precision(room: Room, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return room.a(x)


def reversed_gradients(room: Room, x: torch.Tensor) -> torch.Tensor:
    return Flip.apply(room.a(x))


def checkpointed(room: Room, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(room.a, x, use_reentrant=False)


def drawn(room: Room, x: torch.Tensor) -> torch.Tensor:
    return room.a(x) * 0 if room.training and random.random() < 0.5 else room.a(x)


LOST = {
    "torch.no_grad": without_gradients,
    "torch.autocast": in_full_precision,
    "Flip": reversed_gradients,
    "checkpoint|autograd function": checkpointed,
    "Python or NumPy": drawn,
}


@pytest.mark.parametrize("word", LOST)
def test_what_a_graph_would_lose_keeps_its_module_closed(word: str) -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), room=Room(LOST[word]), last=nn.Linear(4, 2)))
    graph = tt.trace(model, X)
    assert re.search(word, graph.leaves["room"])
    assert graph.node("room").inputs == ("first",)
    with pytest.raises(tt.EditError, match=word):
        tt.cut(model, X, after="room.b")
    net = tt.cut(model, X, after="room")
    assert net.room.between is LOST[word]
    with pytest.raises(tt.TraceError, match=word):
        tt.cut(Room(LOST[word]), X, after="b")


def test_the_check_sees_gradients() -> None:
    plain, flipped = Room(lambda room, x: room.a(x)), Room(reversed_gradients)
    flipped.load_state_dict(plain.state_dict())
    with pytest.raises(Mismatch, match="gradient"):
        compare(Side(plain), Side(flipped), Inputs.of(X))
    frozen = Room(without_gradients)
    frozen.load_state_dict(plain.state_dict())
    with pytest.raises(Mismatch, match=r"gets (a|no) gradient"):
        compare(Side(plain), Side(frozen), Inputs.of(X))
    assert all(parameter.grad is None for parameter in plain.parameters())


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """As the outputs of transformers: a dict and a dataclass at once."""

    last: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    unused: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("last", "pooled", "unused"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Output:
        y = self.layer(x)
        return Output(last=y, pooled=y.tanh())


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_labels = 2
        self.encoder, self.head = Encoder(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        encoded = self.encoder(x)
        logits = self.head(encoded.pooled)
        if labels is None:
            return Output(last=logits, pooled=encoded.unused)
        return F.cross_entropy(logits.view(-1, self.num_labels), labels)


def test_outputs_that_are_dicts_and_dataclasses_keep_their_class() -> None:
    model = Classifier()
    graph = tt.trace(model, X)
    assert graph.leaves == {}
    assert graph.heads == ["head"]
    found = tt.cut(model, X, after="encoder")(X)
    assert isinstance(found, Output)
    assert torch.equal(found["last"], model.encoder.layer(X))
    net = tt.attach_head(model, X, num_classes=7)
    assert net.num_labels == 7
    assert net(X, torch.tensor([0, 3, 6])).dim() == 0


class TwoModes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.out(self.b(F.dropout(x, 0.5, self.training)))


def test_shallow_copies_keep_both_graphs_and_the_history() -> None:
    net = copy.copy(tt.cut(TwoModes(), X, after="b")).train()
    assert not torch.equal(net(X), net(X))
    assert len(tt.history(net).entries) == 1


def test_nested_modules_that_differ_between_the_modes_are_called_once() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = TwoModes(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.dropout(self.inner(x), 0.5, self.training))

    model = nn.Sequential(Outer(), nn.Linear(2, 2))
    net = tt.cut(model, X, after="0.inner.b").eval()
    assert torch.equal(net(X), model[0].inner.b(model[0].inner.a(X)))


def test_users_hooks_see_nothing_of_it() -> None:
    model = Room(lambda room, x: room.a(x))
    seen: list[int] = []
    model.a.register_forward_hook(lambda *_: seen.append(1))
    model.a.register_full_backward_hook(lambda *_: seen.append(2))
    tt.trace(model, X)
    net = tt.attach_head(tt.cut(model, X, after="a"), num_classes=2)
    assert seen == []
    net(X)
    assert seen == [1]


def test_parametrised_and_normalised_weights() -> None:
    def room() -> nn.Module:
        return nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(3)))

    model = room()
    assert tt.trace(model, X).heads == ["2"]
    assert tt.attach_head(model, X, num_classes=5)(X).shape == (3, 5)
    net = tt.cut(model, X, after="1")
    assert torch.equal(net(X), model[:2](X))
    assert not set(net.state_dict()) - set(model.state_dict())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x @ self.weight))

    old = torch.nn.utils.weight_norm(Own(), "weight")
    net = tt.cut(old, X, after="a")
    assert {"weight_g", "weight_v"} <= set(net.state_dict())
    assert torch.allclose(net(X), old.a(X @ old.weight))


def test_functional_heads_are_not_walked_past() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.linear(self.hidden(self.embedding(ids)), self.embedding.weight)

    ids = torch.tensor([[1, 2, 3]])
    assert tt.trace(Tied(), ids).heads == ["embedding.weight"]
    with pytest.raises(tt.HeadError, match=r"embedding\.weight"):
        tt.attach_head(Tied(), ids, num_classes=9)


def test_an_output_of_another_width_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    model = Both()
    with pytest.raises(tt.EditError, match="new width"):
        tt.attach_head(model, torch.randn(2, 4), num_classes=2)
    with pytest.raises(tt.EditError, match="new width"):
        tt.attach_head(model, torch.randn(2, 4), num_classes=2, copy=False)
    assert model.a.out_features == 3


def test_in_place_edits_that_fail_change_nothing_and_count_right() -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).view(-1, 2)

    model = View()
    with pytest.raises(tt.TorchTrimError):
        tt.attach_head(model, X, num_classes=5, copy=False)
    assert model.fc.out_features == 2
    chain = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    net = tt.attach_head(chain, X, num_classes=3, copy=False, replace=False)
    assert net is chain
    assert net(X).shape == (3, 3)
    (entry,) = tt.history(net).entries
    assert (entry.params_before, entry.params_after) == (30, 51)
    model = nn.Sequential(nn.Linear(4, 2))
    (entry,) = tt.history(tt.attach_head(model, X, num_classes=3, copy=False)).entries
    assert (entry.params_before, entry.params_after, entry.edit.replaced) == (10, 15, ("Linear",))


def test_values_that_are_tuples() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.mid, self.out = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, (h, _) = self.lstm(x)
            left, right = self.mid(y).chunk(2, -1)
            return self.out(torch.cat([left, right], -1) + h[-1].unsqueeze(1))

    x = torch.randn(2, 5, 4)
    model = Recurrent()
    (y, _), mid = tt.cut(model, x, after=["lstm", "mid"])(x)
    assert torch.equal(mid, model.mid(y))
    assert len(tt.cut(model, x, after=":chunk")(x)) == 2
    with pytest.raises(tt.HeadError, match=":getitem"):
        tt.attach_head(tt.cut(model, x, after="lstm"), x, num_classes=2)
    assert tt.attach_head(tt.cut(model, x, after=":getitem#0"), x, num_classes=2)(x).shape == (2, 2)


def test_sequences_with_the_batch_second_need_a_layout() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1, enable_nested_tensor=False)
    x = torch.randn(7, 2, 4)
    with pytest.raises(tt.HeadError, match="LNC"):
        tt.attach_head(model, x, num_classes=3, replace=False)
    assert tt.attach_head(model, x, num_classes=3, replace=False, layout="LNC")(x).shape == (2, 3)


def test_leaves_that_depend_on_data_do_not_hide_the_rest() -> None:
    class Select(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(x) if x.sum() > 0 else x

    graph = tt.trace(nn.Sequential(nn.Linear(4, 4), Select(), nn.Linear(4, 2)), X)
    assert graph.node("0").output_shape == (3, 4)
    assert graph.node("1").output_shape is None
    assert "Select" in str(graph)
    assert graph.calls("1.scale") in (0, 1)
    with pytest.raises(tt.PathError, match="it lies in '1', a leaf"):
        graph.node("1.scale")
    with pytest.raises(tt.PathError, match="nope"):
        graph.calls("nope")


def test_a_cut_before_what_cannot_be_read() -> None:
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.mu, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mu = self.mu(self.encoder(x).relu())
            return self.decoder(torch.distributions.Normal(mu, 1.0).rsample())

    model = Sampler()
    net = tt.cut(model, X, after="mu")
    assert torch.equal(net(X), model.mu(model.encoder(X).relu()))
    assert not hasattr(net, "decoder")
    with pytest.raises(tt.TraceError, match="cut before that place"):
        tt.cut(model, X, after="decoder")


def test_names_that_torch_fx_keeps_for_itself() -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.code = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.code(self.first(x))

    with pytest.raises(tt.TraceError, match="'code'"):
        tt.cut(Codebook(), X, after="first", check=False)
    graph = tt.trace(nn.Sequential(Codebook(), nn.Linear(4, 2)), X)
    assert "'code'" in graph.leaves["0"]


def test_arguments_built_otherwise_than_in_the_example() -> None:
    class Flexible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, *xs: torch.Tensor, options: Any = None, route: str = "a", **more: torch.Tensor) -> Any:
            y = sum(self.a(x) for x in xs)
            if options is not None and "twice" in options:
                y = y * 2
            return self.out(y + sum(more.values()))

    net = tt.cut(Flexible(), Inputs((X, X), {"options": {"x": X}, "z": X}), after="out")
    assert net(X, X, options={"x": X}, z=X).shape == (3, 2)
    for args, kwargs in [
        ((X, X, X), {"options": {"x": X}, "z": X}),
        ((X, X), {"options": {"x": X, "twice": X}, "z": X}),
        ((X, X), {"options": {"x": X}, "z": X, "w": X}),
        ((X, X), {"options": {"x": X}, "z": X, "route": "b"}),
    ]:
        with pytest.raises(tt.GuardError):
            net(*args, **kwargs)

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
            return self.out(self.a(x) if scale is None else x * scale)

    net = tt.cut(Keyword(), X, after="a")
    with pytest.raises(tt.GuardError):
        net(X, X)
    with pytest.raises(tt.GuardError, match="scale"):
        net(X, scale=X)


def test_a_write_through_a_layer_that_hands_on_its_input() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.same, self.b, self.out = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            y = self.same(h)
            y += 1
            return self.out(self.b(h) + y)

    model = Through()
    for check in (True, False):
        assert torch.equal(tt.cut(model, X, after="b", check=check)(X), model.b(model.a(X) + 1))


def test_compiled_lazy_and_meta_models() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.compile()
    assert torch.equal(tt.cut(model, X, after="0")(X), model[0](X))
    with pytest.raises(tt.ModelError, match="lazy"):
        tt.cut(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), X, after="0")
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert tt.trace(meta, X).node("2").output_shape == (3, 2)
    assert tt.attach_head(meta, X, num_classes=5)[2].out_features == 5


def test_wrong_inputs_are_said_before_the_head_is_blamed() -> None:
    with pytest.raises(tt.InputError, match="shape"):
        tt.attach_head(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 5), num_classes=2)
    for place in (3, None, nn.Linear, {"0": 1}):
        with pytest.raises(tt.EditError):
            tt.cut(nn.Sequential(nn.Linear(4, 4)), X, after=place)  # type: ignore[arg-type]


def test_hooks_that_are_dropped_are_noted() -> None:
    model = Room(lambda room, x: room.a(x))
    model.register_forward_hook(lambda _m, _a, out: out * 2)
    net = tt.cut(model, X, after="a")
    assert "hooks on the output of 'the model' were dropped" in tt.history(net).entries[0].notes[0]
    with pytest.raises(tt.HeadError, match="hooks on the model's output"):
        tt.attach_head(model, X, num_classes=2, replace=False)


def test_types_and_devices_asked_of_the_parameters_follow_the_model() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x.to(next(self.parameters()).dtype)) + torch.ones(4, dtype=self.b.weight.dtype))

    net = tt.cut(Cast(), X, after=":add").double()
    assert net(X).dtype == torch.float64


def test_isinstance_sees_through_proxies() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            if isinstance(h, torch.Tensor):
                h = h.detach()
            if not torch.is_tensor(h):
                h = torch.tensor(h)
            return self.b(h * 2 if isinstance(x.shape[-1], int) else h)

    model = Careful()
    net = tt.cut(model, X, after="b")
    net(X).sum().backward()
    assert net.a.weight.grad is None
    assert torch.equal(net(X), model(X))


def test_other_threads_notice_nothing() -> None:
    import threading

    stop, failures, rounds = threading.Event(), [], []

    def work() -> None:
        while not stop.is_set():
            with torch.no_grad():
                value = torch.zeros(2)
            rounds.append(1)
            if type(value) is not torch.Tensor:
                failures.append(value)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(10):
            tt.cut(Room(lambda room, x: room.a(x)), X, after="b", check=False)
    finally:
        stop.set()
        thread.join()
    assert rounds
    assert failures == []


def test_a_picture_and_a_head_need_no_graph_that_can_be_run() -> None:
    model = Room(without_gradients)
    graph = tt.trace(model, X)
    assert [node.address for node in graph][1:] == ["a", "b"]
    assert any("torch.no_grad" in line for line in graph.checked)
    assert tt.attach_head(model, X, num_classes=7).b.out_features == 7


def test_hooks_that_change_shapes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(6, 6), nn.Linear(6, 2))
    model[0].register_forward_hook(lambda _m, _a, out: torch.cat([out, out[:, :2]], 1))
    net = tt.cut(model, X, after="1")
    assert torch.equal(net(X), model[1](model[0](X)))
    assert tt.attach_head(model, X, num_classes=5)(X).shape == (3, 5)
    assert tt.trace(model, X).node("1").output_shape == (3, 6)


def test_nan_weights_are_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    assert "where it is a number" in tt.history(tt.cut(model, X, after="0")).entries[0].checked[0]


def test_none_among_what_a_child_returns() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.layer(x), None

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = Pair(), Pair(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, mask = self.first(x)
            if mask is not None:
                y = y.masked_fill(mask.any(), 0.0)
            pair = self.second(y)
            return self.last(pair[0] if pair[1] is None else pair[0] * pair[1])

    model = Asks()
    assert [node.address for node in tt.trace(model, X)][1:] == ["first.layer", "second.layer", "last"]
    assert torch.equal(tt.cut(model, X, after="last")(X), model(X))


class Masked(nn.Module):
    """A forward that makes its own mask where none is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 24)
        self.o = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.q(x).chunk(3, -1)
        if mask is None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("given", [True, False])
def test_an_argument_that_was_given_is_expected_ever_after(given: bool) -> None:
    model, x, mask = Masked().eval(), torch.randn(3, 5, 8), torch.ones(5, 5, dtype=torch.bool)
    ways = {True: (x, mask), False: (x,)}
    net = tt.insert(model, ways[given], nn.Identity(), before="o")
    assert torch.equal(net(*ways[given]), model(*ways[given]))
    with pytest.raises(tt.GuardError, match="mask"):
        net(*ways[not given])
    # Before the mask is used it does not matter.
    cut = tt.cut(model, ways[given], after="q")
    assert torch.equal(cut(x), model.q(x))
