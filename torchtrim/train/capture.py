"""Values inside a forward, by the addresses that `tt.cut` takes: seen by hooks that are there for one forward only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchtrim.edits.addresses import Address
from torchtrim.errors import ModelError, PathError


class Capture:
    """While it is entered, what a model computes at some addresses is kept; afterwards nothing is left in the model.

    Of a call that returns several tensors the first is kept. A value that is written to later in the forward (an
    in-place activation) has to be kept as a copy: `overwritten` tells those that were not.

    Args:
        model: The model.
        places: Where to look.
        copies: The addresses whose values are copied.

    Raises:
        PathError: On leaving: an address was never called, or several times where one call is meant.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with Capture(net, [Address.of(net, "0")]) as capture:
        ...     _ = net(torch.zeros(2, 4))
        >>> capture.values["0"].shape, len(net[0]._forward_hooks)
        (torch.Size([2, 3]), 0)
    """

    def __init__(self, model: nn.Module, places: Sequence[Address], copies: frozenset[str] = frozenset()) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.calls: Counter[str] = Counter()
        self._model, self._places, self._copies = model, tuple(dict.fromkeys(places)), copies
        self._versions: dict[str, int] = {}
        self._handles: list[Any] = []
        self._modes: list[_Functions] = []
        self._learning = False
        self._cut_off: set[str] = set()

    def __enter__(self) -> Capture:
        self._learning = torch.is_grad_enabled()
        for place in self._places:
            module = self._model.get_submodule(place.path)
            if place.function is None:
                self._handles.append(module.register_forward_hook(self._at_module(place)))
            else:
                self._watch_functions(module, place)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for mode in reversed(self._modes):  # those that an exception left behind
            while mode.entered:
                mode.leave()
        self._modes.clear()  # they know this object: the values would wait for the garbage collector
        if error is None:
            for place in self._places:
                self._check(place)

    @property
    def overwritten(self) -> set[str]:
        """The addresses whose values were written to after they were kept."""
        return {text for text, value in self.values.items() if self._versions[text] != version_of(value)}

    def refuse_overwritten(self) -> None:
        """Raise `ModelError` where a kept value is not what was computed there any more."""
        for text in self.overwritten:
            raise ModelError(
                "its value is overwritten by an in-place operation in this mode only",
                path=text,
                hint="the address of what overwrites it",
            )

    def refuse_cut_off(self) -> None:
        """Raise `ModelError` where a value was computed without gradients in a forward that has them."""
        for text in sorted(self._cut_off):
            raise ModelError(
                "its value has no gradients there: nothing would be learnt from a hint",
                path=text,
                found="it is computed under torch.no_grad, as reentrant checkpointing does",
                hint="checkpoint(..., use_reentrant=False), or a place outside of it",
            )

    def _check(self, place: Address) -> None:
        count = self.calls[place.text]
        if place.text not in self.values:
            raise PathError(
                "it was not called in this forward, or gave no tensor" if not count else "no such call",
                path=place.text,
                found=f"{count} calls",
                hint="a path that tt.trace lists",
            )
        if place.number is None and count > 1:
            several = ", ".join(repr(f"{place.text}#{number}") for number in range(min(count, 8)))
            raise PathError(
                "it is called several times, and has a value for each",
                path=place.text,
                found=f"{count} calls",
                hint=f"one of {several}",
            )

    def _keep(self, place: Address, output: Any) -> None:
        number = self.calls[place.text]
        self.calls[place.text] += 1
        if number != (place.number or 0):
            return
        value = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
        if value is not None:
            if self._learning and not torch.is_grad_enabled():
                self._cut_off.add(place.text)
            self.values[place.text] = value = value.clone() if place.text in self._copies else value
            self._versions[place.text] = version_of(value)

    def _at_module(self, place: Address) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._keep(place, output)

        return hook

    def _watch_functions(self, module: nn.Module, place: Address) -> None:
        mode = _Functions(self, place)
        self._modes.append(mode)
        inside = [child for child in module.modules() if child is not module]
        self._handles += [
            module.register_forward_pre_hook(lambda *_: mode.enter()),
            module.register_forward_hook(lambda *_: mode.leave(), always_call=True),
            *(child.register_forward_pre_hook(lambda *_: mode.away(1)) for child in inside),
            *(child.register_forward_hook(lambda *_: mode.away(-1), always_call=True) for child in inside),
        ]


class _Functions(TorchFunctionMode):
    """Sees the functions that one module's own forward calls, outside of the modules in it."""

    def __init__(self, capture: Capture, place: Address) -> None:
        super().__init__()
        self.capture, self.place = capture, place
        self.name = _plain(place.function or "")
        self.entered = 0
        self.depth = 0

    def enter(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]
        self.entered += 1

    def leave(self) -> None:
        if self.entered:
            self.entered -= 1
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def away(self, step: int) -> None:
        self.depth += step

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.depth and _plain(getattr(func, "__name__", "")) == self.name:
            self.capture._keep(self.place, output)
        return output


_SAME = {
    "truediv": "div", "radd": "add", "iadd": "add", "rsub": "sub", "isub": "sub", "rmul": "mul", "imul": "mul",
    "rdiv": "div", "idiv": "div", "rtruediv": "div", "itruediv": "div", "rpow": "pow", "ipow": "pow",
    "rmatmul": "matmul", "imatmul": "matmul",
}  # fmt: skip


def _plain(name: str) -> str:
    """The name of a function as it is called and as a graph has it: `+`, `+=` and `torch.add` are one.

    Example:
        >>> _plain("__rsub__"), _plain("add_"), _plain("truediv")
        ('sub', 'add', 'div')
    """
    name = name.strip("_")
    return _SAME.get(name, name)


def version_of(value: torch.Tensor) -> int:
    """A number that changes when an operation writes to a tensor; always 0 for those of inference mode."""
    return 0 if value.is_inference() else value._version
