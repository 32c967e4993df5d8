"""The study behind the search: several processes may share it, it survives being killed, and tries no plan twice."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torchtrim.autopilot.plans import PlanSpace, TrimPlan
from torchtrim.errors import InputError, MissingDependency

if TYPE_CHECKING:
    import optuna

_STALE = 6 * 3600.0  # seconds: a trial that another machine began longer ago is taken for dead
_SILENT = 20.0  # seconds: one that says nothing of itself for so long was killed as it began
_OWNERS: set[str] = set()  # the studies of this process
_ASKS = 12  # times the sampler is asked again where it suggests what was tried
_WAIT = 0.05
_ATTEMPTS = 3  # to open a database


class TrimStudy:
    """One search over plans.

    What the sampler suggests depends on the seed and on the trials that are done, not on how often the search was
    interrupted: a study that is killed and goes on comes to the trials that it would have come to. Trials that a killed
    process left are begun anew.

    Args:
        storage: A file (a journal that processes on one machine, or on one file system, share), or the URL of a
            database; None: in memory.
        name: The study's name in it.
        about: What the study is of, by which it is told apart from another.
        seed: Of the sampler.
        startup: How many trials are random before the sampler learns from them.

    Raises:
        MissingDependency: optuna is not installed.
        InputError: The storage cannot be used, or holds a study of this name about something else.
    """

    def __init__(
        self, storage: str | os.PathLike[str] | None, name: str, about: str, *, seed: int = 0, startup: int = 4
    ) -> None:
        self._optuna = _imported()
        self._seed, self._startup = seed, startup
        self._silent: dict[int, float] = {}
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
        with _quiet(self._optuna):
            self._study = self._opened(storage, name)
        _OWNERS.add(self._owner)
        known = self.settled("about", lambda: about)
        if known != about:
            raise InputError(
                "the study is of another model, budget, data or choice of plans",
                path=storage,
                found=f"{name}, {known}",
                expected=about,
                hint="another folder=, storage= or study=; or the same data in the same order, not shuffled",
            )

    def settled(self, key: str, find: Callable[[], Any]) -> Any:
        """Plain data that is the same in all processes: the first one that asks finds it, the others wait for that."""
        if key not in self._study.user_attrs:
            with self.turn(key):
                if key not in self._study.user_attrs:
                    self._study.set_user_attr(key, find())
        return self._study.user_attrs[key]

    @contextmanager
    def turn(self, key: str) -> Iterator[None]:
        """One process after the other: a trial of its own stands for each that waits, and the lowest number is next."""
        with _quiet(self._optuna):
            trial = self._study.ask()
            trial.set_user_attr("owner", self._owner)
            trial.set_user_attr("began", time.time())
            trial.set_user_attr("setup", key)
            while any(self._is_before(other, key) for other in self._trials()[: trial.number]):
                time.sleep(_WAIT)
        try:
            yield
        finally:
            self.forget(trial)

    def wait(self) -> None:
        """Wait for the trials that other processes are at."""
        while self.running():
            time.sleep(_WAIT)

    def running(self) -> int:
        """How many trials are being made now."""
        return sum(
            trial.state.name == "RUNNING" and "setup" not in trial.user_attrs and not self._is_dead(trial)
            for trial in self._trials()
        )

    def _is_before(self, other: optuna.trial.FrozenTrial, key: str) -> bool:
        if other.state.name != "RUNNING" or "plan" in other.user_attrs or self._is_dead(other):
            return False
        said = other.user_attrs.get("setup", key)  # one that has not said yet what it is may be another's turn
        return bool(said == key)

    def done(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that came to an end, in their order."""
        return [trial for trial in self._trials() if _is_done(trial)]

    def next(self, space: PlanSpace) -> tuple[optuna.trial.Trial, TrimPlan] | None:
        """A plan that nobody has tried or is trying; None where all were tried."""
        with _quiet(self._optuna):
            self._bury()
            while (plain := self._left(space.plain())) is not None:
                self._study.enqueue_trial(space.parameters(plain))
                found = self._claimed(space)
                if found is not None:
                    return found
            for ask in range(_ASKS):
                self._study.sampler = self._sampler(len(self.done()) * (_ASKS + 1) + ask)
                found = self._claimed(space)
                if found is not None:
                    return found
            while True:
                left = self._left(space)
                if left is None:
                    return None
                self._study.enqueue_trial(space.parameters(left))
                found = self._claimed(space)
                if found is not None:
                    return found

    def tell(
        self, trial: optuna.trial.Trial, value: float, attributes: dict[str, Any], excess: Mapping[str, float]
    ) -> None:
        """A trial was measured; the excess is by how much it is over each limit, below zero where it is within."""
        with _quiet(self._optuna):
            for name, over in excess.items() if self._trials()[trial.number].state.name == "RUNNING" else ():
                trial.set_constraint(name, over)
        self._end(trial, attributes, self._optuna.trial.TrialState.COMPLETE, value)

    def gave_up(self, trial: optuna.trial.Trial, attributes: dict[str, Any]) -> None:
        """A trial went no further than its proxy, which was reported."""
        self._end(trial, attributes, self._optuna.trial.TrialState.PRUNED, None)

    def failed(self, trial: optuna.trial.Trial, why: str, attributes: dict[str, Any]) -> None:
        """A plan cannot be made: it is not tried again."""
        self._end(trial, {**attributes, "why": why}, self._optuna.trial.TrialState.FAIL, None)

    def forget(self, trial: optuna.trial.Trial) -> None:
        """A trial was interrupted: its plan is free again."""
        with _quiet(self._optuna):
            if self._trials()[trial.number].state.name == "RUNNING":
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def worth_it(self, trial: optuna.trial.Trial, proxy: float) -> bool:
        """Whether a proxy is good enough, beside those of the trials that were measured, to be measured as well."""
        with _quiet(self._optuna):
            trial.report(proxy, 0)
            return not trial.should_prune()

    def _end(self, trial: optuna.trial.Trial, attributes: dict[str, Any], state: Any, value: float | None) -> None:
        with _quiet(self._optuna):
            if self._trials()[trial.number].state.name != "RUNNING":
                return  # it was taken for dead, and its plan is another's now
            for name, held in attributes.items():
                trial.set_user_attr(name, held)
            self._study.tell(trial, value, state=state)

    def _claimed(self, space: PlanSpace) -> tuple[optuna.trial.Trial, TrimPlan] | None:
        """A trial whose plan is nobody else's; the one with the lower number has it."""
        trial = self._study.ask()
        trial.set_user_attr("owner", self._owner)
        trial.set_user_attr("began", time.time())
        plan = space.suggested(trial)
        trial.set_user_attr("plan", plan.to_dict())
        for other in self._trials():
            if other.number < trial.number and self._plan_of(other.number) == plan.to_dict():
                self.forget(trial)
                return None
        return trial, plan

    def _plan_of(self, number: int) -> Any:
        """The plan of a trial, once it has one; None where it was given up without a word."""
        while True:
            other = self._trials()[number]
            state = self._optuna.trial.TrialState
            if other.state == state.FAIL and "why" not in other.user_attrs:
                return None
            if other.state == state.WAITING or "setup" in other.user_attrs:
                return None
            if "plan" in other.user_attrs:
                return other.user_attrs["plan"]
            if self._is_dead(other):
                return None
            time.sleep(_WAIT)

    def _left(self, space: Iterable[TrimPlan]) -> TrimPlan | None:
        state = self._optuna.trial.TrialState
        taken = [
            trial.user_attrs.get("plan") for trial in self._trials() if _is_done(trial) or trial.state == state.RUNNING
        ]
        return next((plan for plan in space if plan.to_dict() not in taken), None)

    def _bury(self) -> None:
        """End the trials of processes that are no more."""
        for trial in self._trials():
            if trial.state == self._optuna.trial.TrialState.RUNNING and self._is_dead(trial):
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def _is_dead(self, trial: optuna.trial.FrozenTrial) -> bool:
        owner, began = trial.user_attrs.get("owner"), trial.user_attrs.get("began")
        if owner is None or began is None:
            # It ended between its first words; a database's own times have no zone, so this process looks for itself.
            since = self._silent.setdefault(trial.number, time.time())
            return time.time() - since > _SILENT
        if owner in _OWNERS:
            return False
        age = time.time() - float(began)
        host, pid, _ = str(owner).rsplit(":", 2)
        if host != socket.gethostname():
            return age > _STALE
        return int(pid) == os.getpid() or not _lives(int(pid))

    def _trials(self) -> Sequence[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _sampler(self, number: int) -> Any:
        return self._optuna.samplers.TPESampler(
            seed=(self._seed * 1_000_003 + number) % 2**32,
            n_startup_trials=self._startup,
            constant_liar=True,
        )

    def _opened(self, storage: str | os.PathLike[str] | None, name: str) -> optuna.Study:
        held: Any = None
        pruner = self._optuna.pruners.MedianPruner(n_startup_trials=3)
        try:
            if storage is not None and "://" in str(storage):
                held = str(storage)
            elif storage is not None:
                Path(storage).parent.mkdir(parents=True, exist_ok=True)
                journal = self._optuna.storages.journal
                held = journal.JournalStorage(journal.JournalFileBackend(str(storage)))
            return self._created(held, name, pruner)
        except Exception as error:  # optuna's storages raise what their files and databases do
            raise InputError(
                f"the study's storage cannot be used: {type(error).__name__}: {error}",
                path=storage,
                hint="the path of a file, or a URL such as sqlite:///trim.db",
            ) from error

    def _created(self, storage: Any, name: str, pruner: Any) -> optuna.Study:
        """Make the study, or open it; processes that make a new database at once get in each other's way at first."""
        for _ in range(_ATTEMPTS if isinstance(storage, str) else 0):
            try:
                return self._create(storage, name, pruner)
            except Exception:  # noqa: BLE001 -- whatever the database raises: it is raised again below, where it stays
                time.sleep(1.0)
        return self._create(storage, name, pruner)

    def _create(self, storage: Any, name: str, pruner: Any) -> optuna.Study:
        made: optuna.Study = self._optuna.create_study(
            storage=storage, study_name=name, pruner=pruner, direction="minimize", load_if_exists=True
        )
        return made


def _is_done(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial came to an end of its own."""
    return trial.state.name in ("COMPLETE", "PRUNED") or (trial.state.name == "FAIL" and "why" in trial.user_attrs)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _imported() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingDependency("the autopilot searches with optuna", hint='pip install "torchtrim[trim]"') from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's line for each trial, and what it says of parts of it that may change one day."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
