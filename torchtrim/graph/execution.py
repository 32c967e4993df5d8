"""One forward of a model, watched: which modules are called, in what order, what they give and what they cost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from torchtrim.errors import InputError, ModelError, TorchTrimError
from torchtrim.graph.copying import has_function_hooks, is_meta, kept_random_state, structural_copy, unwrap
from torchtrim.graph.fakes import Fakes
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.watch import Call, Value, Watch, dtype_name, values_of


@dataclass(frozen=True)
class Execution:
    """One forward in eval (or train) mode.

    Attributes:
        inputs: The tensors the model was given.
        calls: Every module call, by start. A module whose weights its parent uses without calling it (`out_proj` of
            `nn.MultiheadAttention`) has none; `first_use` knows of its weights.
        first_use: When each parameter was first read, by its first name; unread parameters are absent.
        macs: MACs spent within the calls of each path, at batch 1.
        own_macs: MACs spent by the path itself, outside the modules it calls, at batch 1.
        user_hooks: Whether hooks that are plain functions had to be run: without them the model refuses its inputs.
        ran: `"fake"` where only shapes were computed; `"real"` where the model had to be run, since its forward
            depends on values.
    """

    inputs: tuple[Value, ...]
    calls: tuple[Call, ...]
    first_use: dict[str, int]
    macs: dict[str, int]
    own_macs: dict[str, int]
    ran: str
    user_hooks: bool = False

    def calls_of(self, path: str) -> list[Call]:
        """The calls of one path, in order."""
        return [call for call in self.calls if call.path == path]


def run_fake(model: nn.Module, inputs: Inputs, *, train: bool = False) -> Execution:
    """Run a model once without computing anything, and record what it does.

    It runs on fake tensors, on a copy: it costs neither compute nor memory, also for a model on the meta device.
    A forward that depends on values (boxes, masks) is run once for real, without gradients. Inputs are taken to the
    model's device. Forward hooks that are plain functions are left out, so that nothing is written to what they write
    to; hooks with state of their own (weight norm, feature extractors) run on their copies.

    MACs are for batch 1: the first dimension of the first tensor is taken for the batch. Inputs whose batch cannot be
    told (a list of images) count as they are.

    Raises:
        InputError: The model refuses the inputs; names the innermost module that did.
        ModelError: The model cannot be copied, or has lazy parameters that were never initialised.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> execution = run_fake(net, Inputs.of(torch.zeros(8, 4)))
        >>> [(call.path, str(call.outputs[0])) for call in execution.calls]
        [('', 'float32[8, 3]'), ('0', 'float32[8, 3]'), ('1', 'float32[8, 3]')]
        >>> execution.macs["0"]
        12
    """
    model = unwrap(model)
    refuse_lazy(model)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    if device is not None:
        inputs = inputs.map(lambda tensor: tensor.to(device))
    inputs.bind(model)
    execution = _run(model, inputs, train)
    batch = _batch_of(inputs)
    if batch < 2:
        return execution
    try:
        single = _run(model, inputs.with_batch(1), train)
        macs, own_macs = single.macs, single.own_macs
    except InputError:
        # Batch 1 is refused: the batch is written into the model, or the first dimension is not a batch at all.
        outputs = execution.calls_of("")[0].outputs
        share = batch if outputs and outputs[0].shape[:1] == (batch,) else 1
        macs = {path: count // share for path, count in execution.macs.items()}
        own_macs = {path: count // share for path, count in execution.own_macs.items()}
    return replace(execution, macs=macs, own_macs=own_macs)


def run_if_known(model: nn.Module, example_inputs: ExampleInputs | None) -> Execution | None:
    """`run_fake` on the given inputs, or on those the model's history recorded; `None` where there are neither."""
    inputs = Inputs.of(example_inputs) if example_inputs is not None else known_inputs(unwrap(model))
    return run_fake(model, inputs) if inputs is not None else None


def module_ticks(model: nn.Module, execution: Execution) -> dict[str, int]:
    """When each path is first at work: called, or a weight of its own or a module below it at work; else absent."""
    ticks = dict(execution.first_use)
    for call in execution.calls:
        ticks[call.path] = min(call.start, ticks.get(call.path, call.start))
    first: dict[str, int] = {}
    for path, tick in ticks.items():
        parts = path.split(".")
        for end in range(len(parts) + 1):
            above = ".".join(parts[:end])
            first[above] = min(tick, first.get(above, tick))
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    return {path: tick for path, tick in first.items() if path in modules}


def known_inputs(model: nn.Module) -> Inputs | None:
    """Example inputs, on the CPU, made from what the model's history recorded of them; `None` where it recorded none.

    Example:
        >>> known_inputs(nn.Linear(2, 2)) is None
        True
    """
    spec = model.__dict__.get("_torchtrim_inputs")
    return None if spec is None else inputs_from_spec(spec)


def spec_of(inputs: Inputs) -> dict[str, Any]:
    """Inputs as plain data: every tensor becomes its shape and type. JSON can hold it where the other arguments can.

    Example:
        >>> spec_of(Inputs.of(torch.zeros(1, 3)))
        {'args': [{'shape': [1, 3], 'dtype': 'float32'}], 'kwargs': {}}
    """

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return {"tuple": [plain(item) for item in value]}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return {"args": [plain(arg) for arg in inputs.args], "kwargs": plain(inputs.kwargs)}


def inputs_from_spec(spec: dict[str, Any]) -> Inputs:
    """Inputs of the recorded shapes and types: seeded normal values, zeros for whole numbers and truth values.

    Raises:
        InputError: Not such a record.

    Example:
        >>> inputs_from_spec({"args": [{"shape": [2, 3], "dtype": "int64"}], "kwargs": {}}).describe()
        'int64[2, 3]'
    """
    generator = torch.Generator().manual_seed(0)

    def value_of(plain: Any) -> Any:
        if isinstance(plain, list):
            return [value_of(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        if set(plain) == {"tuple"}:
            return tuple(value_of(item) for item in plain["tuple"])
        if set(plain) != {"shape", "dtype"}:
            return {key: value_of(item) for key, item in plain.items()}
        dtype = getattr(torch, str(plain["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(
                "the recorded inputs name no tensor type", found=plain["dtype"], expected="float32, int64, ..."
            )
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(plain["shape"], generator=generator).to(dtype)
        return torch.zeros(plain["shape"], dtype=dtype)

    try:
        return Inputs(tuple(value_of(arg) for arg in spec["args"]), value_of(spec["kwargs"]))
    except (KeyError, TypeError) as error:
        raise InputError("not a record of example inputs", found=spec, expected="args and kwargs") from error


def refuse_lazy(model: nn.Module) -> None:
    """Raise `ModelError` for a model with parameters that get their shape at the first forward."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                "a lazy parameter has no shape yet",
                path=name,
                hint="run the model once on a real batch before reading it",
            )


def _batch_of(inputs: Inputs) -> int:
    """The batch size where the first tensor is an argument by itself; 1 where it lies in a list or a dict."""
    for value in (*inputs.args, *inputs.kwargs.values()):
        if isinstance(value, torch.Tensor):
            return inputs.batch
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
            return 1
    return 1


def _run(model: nn.Module, inputs: Inputs, train: bool) -> Execution:
    # Users' own hooks see nothing of this run, unless the model does not run without them.
    ways = [(False, False)] + ([(False, True)] if has_function_hooks(model) else [])
    # Wrong inputs, or a forward that needs values: the real run tells which, and its message is the one users know.
    ways += [] if is_meta(model) else [(True, user_hooks) for _, user_hooks in ways]
    for real, user_hooks in ways[:-1]:
        with suppress(InputError):
            return _run_once(model, inputs, train, real=real, user_hooks=user_hooks)
    real, user_hooks = ways[-1]
    return _run_once(model, inputs, train, real=real, user_hooks=user_hooks)


def _run_once(model: nn.Module, inputs: Inputs, train: bool, *, real: bool, user_hooks: bool) -> Execution:
    with ExitStack() as stack:
        stack.enter_context(kept_random_state())
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_fused_attention())
        twin = structural_copy(model, own_buffers=real, user_hooks=user_hooks)
        if real:
            given = inputs.fresh()
        else:
            fake = Fakes()
            # Copied before the mode is entered: inside it, the copies of plain tensors would be fakes too.
            twin, given = faked(twin, fake), inputs.map(fake.from_tensor)
            stack.enter_context(fake)
        twin.train(train)
        watch = stack.enter_context(Watch(twin, real=real))
        try:
            given.call(twin)
        except (TorchTrimError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise watch.refusal(error, inputs) from error
    calls = tuple(sorted(watch.calls, key=lambda call: call.start))
    macs, own_macs = dict(watch.macs), dict(watch.own_macs)
    values = values_of((inputs.args, inputs.kwargs))
    return Execution(values, calls, watch.first_use, macs, own_macs, "real" if real else "fake", user_hooks)


@contextmanager
def no_fused_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from doing all of its work in one operator whose parts cannot be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def faked(twin: nn.Module, fake: Fakes) -> nn.Module:
    """The modules with fake tensors in place of parameters and buffers, wherever they are referred to."""
    memo: dict[int, Any] = {}
    for parameter in twin.parameters():
        # A subclass (quantized weights) may not have a fake form: it stays, and is made fake where it is used.
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(fake.from_tensor(parameter.detach()), False) if plain else parameter
    for buffer in twin.buffers():
        memo[id(buffer)] = fake.from_tensor(buffer.detach())
    return copy.deepcopy(twin, memo)
