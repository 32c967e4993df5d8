"""The study of the autopilot: killed and gone on with, shared by processes, in a file and in a database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchtrim.autopilot.plans import PlanSpace, TrimPlan
from torchtrim.autopilot.study import TrimStudy
from torchtrim.errors import InputError, MissingDependency

SPACE = PlanSpace((0, 1, 2, 3, 4), ("magnitude", "reconstruction"), (), ("float32", "static"), ("a", "b", "c", "d"))
# A process that tries plans until so many are done; it may kill itself in the middle of one, or wait between two.
SCRIPT = """
import os, signal, sys, time
from test_trim_study import SPACE, loss
from torchtrim.autopilot.study import TrimStudy
storage, trials, die_at, wait = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
study = TrimStudy(storage, "s", "x", seed=5)
while len(study.done()) < trials:
    claimed = study.next(SPACE)
    if claimed is None:
        break
    trial, plan = claimed
    if len(study.done()) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(wait)
    if not study.worth_it(trial, loss(plan) / 2):
        study.gave_up(trial, {"proxy": loss(plan) / 2})
    elif plan.remove == 3:
        study.failed(trial, "cannot be made", {})
    else:
        study.tell(trial, loss(plan), {"score": 1 - loss(plan)}, {"macs": loss(plan) - 0.5})
"""


def loss(plan: TrimPlan) -> float:
    return (0.1 + abs(plan.remove - 2) / 4 + 0.3 * (plan.pruning == "magnitude") + 0.2 * (plan.scheme == "static")) / 2


def start(storage: str, trials: int, die_at: int = -1, wait: float = 0.0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, storage, str(trials), str(die_at), str(wait)]
    root = Path(__file__).parent
    paths = [str(root), str(root.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})


def outcome(storage: str) -> list[Any]:
    study = TrimStudy(storage, "s", "x")
    return [(trial.user_attrs["plan"], trial.state.name, trial.value) for trial in study.done()]


def test_every_plan_once() -> None:
    plans = list(SPACE)
    assert len(plans) == len(set(plans)) == len(SPACE) == 20
    assert [SPACE.suggested(_Fixed(SPACE.parameters(plan))) for plan in plans] == plans
    shares = PlanSpace((0, 1), ("magnitude", "isomorphic"), (1.0, 0.5), ("float32",), ("a",))
    assert len(shares) == 2 * 3  # all MACs kept is one plan, however channels would be ranked
    assert PlanSpace.from_dict(json.loads(json.dumps(shares.to_dict()))) == shares
    assert [shares.suggested(_Fixed(shares.parameters(plan))) for plan in shares] == list(shares)


class _Fixed:
    """A trial that suggests what it was made with."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self._parameters = parameters

    def suggest_int(self, name: str, low: int, high: int) -> int:
        assert low <= self._parameters[name] <= high
        return int(self._parameters[name])

    def suggest_categorical(self, name: str, choices: tuple[str, ...]) -> str:
        assert self._parameters[name] in choices
        return str(self._parameters[name])


def test_a_study_that_was_killed_twice_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, killed = (str(tmp_path / name) for name in ("whole.journal", "killed.journal"))
    assert start(whole, 12).wait() == 0
    assert start(killed, 12, die_at=4).wait() == -9
    assert start(killed, 12, die_at=9).wait() == -9
    assert start(killed, 12).wait() == 0
    assert len(outcome(whole)) == 12
    assert outcome(killed) == outcome(whole)
    assert {state for _, state, _ in outcome(whole)} >= {"COMPLETE", "PRUNED"}


@pytest.mark.parametrize("kind", ["journal", pytest.param("database", marks=pytest.mark.slow)])
def test_processes_that_share_a_study_try_no_plan_twice(tmp_path: Path, kind: str) -> None:
    storage = str(tmp_path / "shared.journal") if kind == "journal" else f"sqlite:///{tmp_path}/shared.db"
    trials = 100 if kind == "journal" else 8  # more than there are plans; a database is slow
    both = [start(storage, trials, wait=0.02) for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0]
    plans = [json.dumps(plan, sort_keys=True) for plan, _, _ in outcome(storage)]
    assert len(plans) == len(SPACE) if kind == "journal" else 8 <= len(plans) <= 9
    assert len(set(plans)) == len(plans)


def test_a_study_learns() -> None:
    study = TrimStudy(None, "s", "x", seed=1)
    found = []
    for _ in range(12):
        claimed = study.next(SPACE)
        assert claimed is not None
        trial, plan = claimed
        found.append(loss(plan))
        study.tell(trial, loss(plan), {}, {})
    assert min(found) == min(map(loss, SPACE))
    assert sum(found[6:]) < sum(found[:6])


def test_a_plan_that_was_interrupted_is_free_again() -> None:
    space = PlanSpace((1,), ("magnitude",), (), ("float32",), ("a",))
    study = TrimStudy(None, "s", "x")
    first = study.next(space)
    assert first is not None
    assert study.next(space) is None
    study.forget(first[0])
    again = study.next(space)
    assert again is not None
    study.failed(again[0], "cannot be made", {})
    assert study.next(space) is None
    assert [trial.user_attrs["why"] for trial in study.done()] == ["cannot be made"]


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    TrimStudy(tmp_path / "s.journal", "s", "one model")
    with pytest.raises(InputError, match="of another model") as error:
        TrimStudy(tmp_path / "s.journal", "s", "another model")
    assert "another model" in str(error.value.expected)
    TrimStudy(tmp_path / "s.journal", "another name", "another model")


def test_a_storage_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file" / "s.journal", "nosuchdatabase://x", str(tmp_path)):
        with pytest.raises(InputError, match="cannot be used"):
            TrimStudy(storage, "s", "x")


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependency, match="optuna") as error:
        TrimStudy(None, "s", "x")
    assert "torchtrim[trim]" in str(error.value.hint)
