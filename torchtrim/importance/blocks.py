"""Which modules are blocks: they hand their input on, with something added, so that each can be taken out by itself.

A module is one where its output has the shape and type of its input, and is that input with something added (or set
beside it): on the way through it the input meets additions, norms, activation functions and changes of its form, but no
multiplication with weights. That is told from the operators of one run on shapes, not from names or classes. A module
whose whole cost lies in smaller blocks is a stack of them, and these are the blocks; what lies within a block is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.errors import EditError, InputError, PathError, TorchTrimError
from torchtrim.graph.copying import has_function_hooks, is_meta, kept_random_state, structural_copy
from torchtrim.graph.execution import faked, no_fused_attention
from torchtrim.graph.fakes import Fakes
from torchtrim.graph.handing_on import Form, described, values_given
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.macs import macs_of
from torchtrim.graph.paths import What, select


@dataclass(frozen=True)
class Block:
    """A module that can be taken out.

    Attributes:
        path: Its path.
        form: How it takes its main value, and gives one back.
        calls: How often one forward calls it.
        params: Its parameters.
        macs: The MACs of its calls at batch 1.
        channels: The axis of its main value that the channels lie along.
        follows: Whether what goes in is what the block before gave, so that the two can go as one run.
    """

    path: str
    form: Form
    calls: int
    params: int
    macs: int
    channels: int
    follows: bool


def blocks_of(model: nn.Module, inputs: Inputs, what: What | None = None) -> list[Block]:
    """The blocks of a model, in the order of execution.

    Args:
        model: The model. It is left as it was; nothing is computed but shapes, unless its forward depends on values.
        inputs: Example inputs.
        what: Take these modules in place of those that are found: paths, globs, types, predicates, or a list of these.

    Raises:
        EditError: There are none; or one that was named does not hand its input on in the same shape.
        PathError: One that was named does not exist, or is never called.
        InputError: The model refuses the example inputs.

    Example:
        >>> class Unit(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Unit(4, 4), Unit(4, 4)), nn.Linear(4, 2))
        >>> [(block.path, block.macs) for block in blocks_of(net, Inputs.of(torch.zeros(5, 3)))]
        [('1.0', 16), ('1.1', 16)]
    """
    wanted = None if what is None else set(_first_names(model, select(model, what)))
    calls = _calls(model, inputs, wanted)
    if wanted is not None:
        _refuse_unfit(wanted, calls)
    by_path: dict[str, list[_Call]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    # Of a module that is called in two ways, or is a block at one call only, nothing can stand for all calls.
    kept = {path: several for path, several in by_path.items() if len({call.form for call in several}) == 1}
    if not kept:
        raise EditError(
            "it has no block: no module hands its input on with something added",
            found=type(model).__name__,
            expected="residual units or transformer layers",
            hint="blocks=, the paths of modules whose input and output shapes agree",
        )
    found: list[Block] = []
    before: _Call | None = None
    for path, several in kept.items():
        first = several[0]
        single = len(several) == 1 and len(by_path.get(path, ())) == 1
        follows = single and before is not None and before.result is first.value
        before = first if single else None
        module = model.get_submodule(path)
        macs = sum(call.macs for call in several) // max(inputs.batch, 1)
        params = sum(parameter.numel() for parameter in module.parameters())
        channels = _channel_axis(module, first.value.dim())
        found.append(Block(path, first.form or Form(), len(several), params, macs, channels, follows))
    return found


def _first_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    names = {module: path for path, module in reversed(list(model.named_modules()))}
    return [names[model.get_submodule(path)] for path in paths]


def _refuse_unfit(wanted: set[str], calls: Sequence[_Call]) -> None:
    for path in sorted(wanted):
        own = [call for call in calls if call.path == path]
        if not own:
            raise PathError("it is never called for these inputs", path=path, hint="a path that tt.summary lists")
        for call in own:
            if call.reason is not None:
                raise call.reason
            if call.value.shape != call.result.shape or call.value.dtype != call.result.dtype:
                raise EditError(
                    "what it returns has not the shape of what it is given: it cannot be left out by itself",
                    path=path,
                    found=f"{list(call.value.shape)} to {list(call.result.shape)}",
                    expected="the same shape and type",
                )


def _channel_axis(module: nn.Module, dims: int) -> int:
    """Convolutions have their channels in the second place, all else has them in the last."""
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    kind = kinds.get(dims - 2)
    inner = list(module.modules())
    convolves = kind is not None and any(isinstance(each, kind) for each in inner)
    tokens = dims == 3 and any(isinstance(each, nn.Linear) for each in inner)  # a convolution over tokens, turned
    return 1 if convolves and not tokens else dims - 1


@dataclass(eq=False)
class _Call:
    """A call that was watched.

    Attributes:
        path: The module.
        value: The main value that went in; `result`: the one that came out; `form`: how.
        macs: MACs within it.
        reason: Why nothing can stand for what it returns.
    """

    path: str
    value: torch.Tensor
    result: torch.Tensor
    form: Form | None
    macs: int
    reason: EditError | None = None


@dataclass(eq=False)
class _Frame:
    """A call that runs.

    Attributes:
        number: Its number, by which tensors know that they come from what it was given.
        earlier: How many calls were noted before it began.
        macs: MACs within it so far.
        in_blocks: Those of them within smaller blocks.
    """

    number: int
    path: str
    module: nn.Module
    args: Any
    kwargs: Any
    earlier: int
    macs: int = 0
    in_blocks: int = 0


def _calls(model: nn.Module, inputs: Inputs, wanted: set[str] | None) -> list[_Call]:
    """The calls of blocks, or those of the modules that are wanted, in one run in eval mode."""
    device = next((held.device for held in (*model.parameters(), *model.buffers())), None)
    given = inputs if device is None else inputs.map(lambda tensor: tensor.to(device))
    hooked = (False, True) if has_function_hooks(model) else (False,)
    ways = [(real, hooks) for hooks in hooked for real in ((False,) if is_meta(model) else (False, True))]
    for real, hooks in ways[:-1]:
        with suppress(InputError):
            return _run(model, given, wanted, real=real, hooks=hooks)
    return _run(model, given, wanted, real=ways[-1][0], hooks=ways[-1][1])


def _run(model: nn.Module, inputs: Inputs, wanted: set[str] | None, *, real: bool, hooks: bool) -> list[_Call]:
    with ExitStack() as stack:
        for each in (kept_random_state(), torch.no_grad(), no_fused_attention()):
            stack.enter_context(each)
        twin = structural_copy(model, own_buffers=real, user_hooks=hooks)
        given = inputs.fresh()
        if not real:
            fake = Fakes()
            twin, given = faked(twin, fake), inputs.map(fake.from_tensor)
            stack.enter_context(fake)
        follower = _Follower(twin.eval(), wanted)
        stack.enter_context(follower)
        try:
            given.call(twin)
        except (TorchTrimError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's model raises
            where = follower.frames[-1].path if follower.frames else None
            raise InputError(
                f"the model refuses the example inputs: {error}", path=where or None, found=inputs.describe()
            ) from error
    return follower.calls


@dataclass(frozen=True)
class _Origin:
    """Which running calls a tensor comes from.

    Attributes:
        handed_on: Those whose main value it still holds, with something added at most.
        worked_on: Those whose main value it was computed from in other ways.
    """

    handed_on: frozenset[int] = field(default_factory=frozenset)
    worked_on: frozenset[int] = field(default_factory=frozenset)


_NOTHING = _Origin()
# One operand handed on is enough: the other is what is added, or what is set beside it.
_ADDING = ("add", "add_", "sub", "sub_", "cat", "stack", "concat", "addcmul", "addcmul_")


class _Follower(TorchDispatchMode):
    """Follows what each call is given through the operators within it."""

    def __init__(self, twin: nn.Module, wanted: set[str] | None) -> None:
        TorchDispatchMode.__init__(self)
        self.wanted = wanted
        self.frames: list[_Frame] = []
        self.calls: list[_Call] = []
        self.origins: dict[int, _Origin] = {}
        self.held: list[torch.Tensor] = []  # alive, so that no other tensor gets the identity of one of them
        self.numbers = itertools.count()
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(self._enter(path), with_kwargs=True, prepend=True)
            module.register_forward_hook(self._leave(path))

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            frame = _Frame(next(self.numbers), path, module, args, kwargs, len(self.calls))
            self.frames.append(frame)
            candidates = values_given(args, kwargs)
            if path and candidates:
                value = candidates[0][2]
                old = self.origins.get(id(value), _NOTHING)
                self._set(value, _Origin(old.handed_on | {frame.number}, old.worked_on))

        return enter

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            while (frame := self.frames.pop()).module is not module:
                continue  # left by an exception that a forward caught
            handed_on = self._note(frame, output)
            if self.frames:
                above = self.frames[-1]
                above.macs += frame.macs
                above.in_blocks += frame.macs if handed_on else frame.in_blocks

        return leave

    def _note(self, frame: _Frame, output: Any) -> bool:
        """Whether it hands its input on; notes the call where it is a block, or wanted."""
        try:
            value, result, form = described(frame.path, frame.args, frame.kwargs, output)
        except EditError as error:
            if self.wanted is not None and frame.path in self.wanted:
                nothing = torch.empty(0)
                self.calls.append(_Call(frame.path, nothing, nothing, None, frame.macs, error))
            return False
        call = _Call(frame.path, value, result, form, frame.macs)
        if self.wanted is not None:
            if frame.path in self.wanted:
                self.calls.append(call)
            return False
        same = value.shape == result.shape and value.dtype == result.dtype and frame.path != ""
        origin = self.origins.get(id(result), _NOTHING)
        if not same or not frame.macs or frame.number not in origin.handed_on:
            return False
        if frame.in_blocks < frame.macs:
            del self.calls[frame.earlier :]  # what lies within a block is none
            self.calls.append(call)
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        macs = macs_of(func, args, kwargs, out)
        if self.frames:
            self.frames[-1].macs += macs
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = [self.origins[id(leaf)] for leaf in operands if id(leaf) in self.origins]
        if not known:
            return out
        running = {frame.number for frame in self.frames}
        handed_on = frozenset[int]().union(*(origin.handed_on for origin in known)) & running
        worked_on = frozenset[int]().union(*(origin.worked_on for origin in known)) & running
        if macs:
            handed_on, worked_on = frozenset(), handed_on | worked_on
        elif func._schema.name.partition("::")[2] not in _ADDING:
            # As where it is scaled by what was made of it.
            handed_on -= frozenset[int]().union(*(origin.worked_on - origin.handed_on for origin in known))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._set(leaf, _Origin(handed_on, worked_on))
        return out

    def _set(self, tensor: torch.Tensor, origin: _Origin) -> None:
        if id(tensor) not in self.origins:
            self.held.append(tensor)
        self.origins[id(tensor)] = origin
