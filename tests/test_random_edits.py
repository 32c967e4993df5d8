"""Random sequences of edits: a sample of what `benchmarks/random_edits.py` runs by the thousand."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import torchtrim as tt

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def edits() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("random_edits")
    finally:
        sys.path.remove(str(BENCHMARKS))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(draw=st.randoms(use_true_random=False))
def test_an_edit_is_refused_whole_or_gives_a_model_that_works(edits: Any, draw: random.Random) -> None:
    edits.sequence(draw)


def test_the_harness_sees_what_must_not_happen(edits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose edits write to it, or whose history forgets, is found out."""

    def writes(draw: random.Random, net: torch.nn.Module, inputs: Any) -> Any:
        def change() -> torch.nn.Module:
            with torch.no_grad():
                next(net.parameters()).add_(1)
            return tt.cut(net, inputs, after=next(iter(net._modules)))

        return change, "writes"

    def forgets(draw: random.Random, net: torch.nn.Module, inputs: Any) -> Any:
        def change() -> torch.nn.Module:
            edited = tt.attach_head(net, inputs, 3)
            with torch.no_grad():
                next(edited.parameters()).add_(1)
            return edited

        return change, "forgets"

    for wrong, message in ((writes, "changed the model"), (forgets, "replayed")):
        monkeypatch.setattr(edits, "EDITS", {"wrong": wrong})
        monkeypatch.setattr(edits, "MODELS", {"plain": edits.MODELS["plain"]})
        with pytest.raises(edits.Wrong, match=message):
            edits.sequence(random.Random(0))
