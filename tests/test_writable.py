"""Names of modules and arguments must not become code in the source that `torch.fx` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import torchtrim as tt
from torchtrim.errors import TorchTrimError
from torchtrim.graph.opened import OpenedModule

X = torch.randn(2, 4)


def evil(code: str) -> str:
    return f"training\"), getattr(__import__('builtins'),'exec')({code!r}), type(\""


def net(name: str) -> nn.Module:
    inner = nn.Sequential(nn.ReLU())
    inner.add_module(name, nn.Linear(4, 4))
    inner.add_module("last", nn.ReLU())
    return nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2)).eval()


@pytest.mark.parametrize("name", ['a"b', "a\\", "a\nb", "class", "\N{LATIN SMALL LIGATURE FI}t"])
def test_a_module_with_a_child_of_such_a_name_stays_closed(name: str) -> None:
    model = net(name)
    before = model(X)
    assert "cannot hold" in tt.trace(model, X).leaves["1"]
    assert torch.equal(tt.insert(model, X, nn.Identity(), after="1.0")(X), before)
    with pytest.raises(TorchTrimError, match="cannot hold"):
        tt.cut(model, X, after=["1.0", "1.last"])


@pytest.mark.parametrize("name", ["1x1 conv", "a-b", "größe", "self"])
def test_other_names_are_no_hindrance(name: str) -> None:
    model = net(name)
    found = tt.cut(model, X, after=["1.0", f"1.{name}"])(X)
    assert torch.equal(
        found[f"1.{name}"] if isinstance(found, dict) else found[1], model[1][1](model[1][0](model[0](X)))
    )


def edits(code: str) -> list[dict[str, Any]]:
    children = {"a": {"type": "ReLU"}, evil(code): {"type": "ReLU"}, "b": {"type": "ReLU"}}
    insert = {"kind": "insert", "module": {"type": "Sequential", "children": children}, "after": "0", "name": "q"}
    return [insert, {"kind": "cut", "after": ["q.a", "q.b"]}]


@pytest.mark.parametrize("do", [tt.apply, tt.plan])
def test_a_record_runs_no_code(do: Callable[..., Any], tmp_path: Path) -> None:
    place = tmp_path / "ran"
    with pytest.raises(TorchTrimError):
        do(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), X, edits(f"open({str(place)!r}, 'w')"))[0](X)
    assert not place.exists()


def test_no_graph_with_such_a_name_becomes_source() -> None:
    for op, target, kwargs in (
        ("call_module", 'x"', {}),
        ("call_method", 'x"', {}),
        ("call_function", max, {"a=1)#": 1}),
    ):
        graph = fx.Graph()
        graph.output(graph.create_node(op, target, (graph.placeholder("x"),), kwargs))
        with pytest.raises(tt.TraceError, match="cannot hold"):
            OpenedModule("Net", graph)
