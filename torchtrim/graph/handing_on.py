"""How a call hands its main value on: which of its arguments that is, and in what form it comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from torchtrim.errors import EditError
from torchtrim.graph.check import flatten


@dataclass(frozen=True)
class Form:
    """How a module takes its main value, and in what form it gives one back: the arguments of a `PassOn`.

    Attributes:
        argument: The argument that is, or holds, the main value: a position or a name.
        item: Its place in that argument, where that is a list.
        form: `"value"`, `"tuple"` or `"list"`.
        outputs: What such a tuple holds: `"value"`, `"none"`, or another argument (`"=1"`, `"=mask"`).
        alone: Whether the value is the only argument, so that an `nn.Identity` will do.
    """

    argument: int | str = 0
    item: int | None = None
    form: str = "value"
    outputs: tuple[str, ...] = ()
    alone: bool = True

    @property
    def plain(self) -> bool:
        """Whether an `nn.Identity` does it."""
        return self.alone and self.argument == 0 and self.item is None and self.form == "value"


def described(path: str, args: Any, kwargs: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor, Form]:
    """The main values of a call (the first tensors of real numbers that go in and come out), and its form.

    Raises:
        EditError: Nothing that goes in can stand for what comes out.

    Example:
        >>> value, result = torch.zeros(2), torch.ones(2)
        >>> described("0", (value,), {}, (result, None))[2]
        Form(argument=0, item=None, form='tuple', outputs=('value', 'none'), alone=True)
    """
    candidates = values_given(args, kwargs)
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    if not candidates:
        shapes = [
            f"{str(leaf.dtype)[6:]}{list(leaf.shape)}" for leaf in flatten((args, kwargs)).values() if _is_tensor(leaf)
        ]
        raise EditError(
            "nothing that goes in can stand for what comes out",
            path=path,
            found=", ".join(shapes) or "no tensor",
            expected="a tensor of real numbers",
            hint="tt.replace, with a module that makes the value",
        )
    argument, item, value = candidates[0]
    alone = len(named) == 1
    if _is_value(output):
        return value, output, Form(argument, item, alone=alone)
    kind = type(output).__name__
    results = [one for one in output if _is_value(one)] if type(output) in (tuple, list) else []
    if not results:
        raise EditError(
            "what it returns cannot be put together from what it is given",
            path=path,
            found=kind,
            expected="a tensor, or a tuple or list of tensors",
            hint="remove modules inside it",
        )
    outputs = tuple(
        "value" if one is results[0] else _stand_in(path, index, one, named) for index, one in enumerate(output)
    )
    return value, results[0], Form(argument, item, kind, outputs, alone)


def _stand_in(path: str, index: int, output: Any, named: list[tuple[int | str, Any]]) -> str:
    """Which argument can stand for a further output."""
    if output is None:
        return "none"
    alike = [name for name, argument in named if argument is output]
    alike += [name for name, argument in named if name == index and _alike(argument, output)]
    if not alike:
        found = f"{type(output).__name__}{list(output.shape)}" if _is_tensor(output) else repr(output)
        raise EditError(
            f"nothing that goes in can stand for its output number {index}",
            path=path,
            found=found,
            hint="remove modules inside it, or tt.replace it",
        )
    return f"={alike[0]}"


def _alike(one: Any, other: Any) -> bool:
    if _is_tensor(one) and _is_tensor(other):
        return bool(one.shape == other.shape and one.dtype == other.dtype)
    return type(one) is type(other) and isinstance(one, (int, float, str, bool)) and one == other


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_value(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def main_value(form: Form, args: Any, kwargs: Any) -> torch.Tensor:
    """The main value among the arguments of a call."""
    value = args[form.argument] if isinstance(form.argument, int) else kwargs[form.argument]
    return value if form.item is None else value[form.item]  # type: ignore[no-any-return]


def in_form(form: Form, value: Any, args: Any, kwargs: Any) -> Any:
    """What the call would return if it handed on a value: what goes beside that is taken from the arguments."""
    if form.form == "value":
        return value
    named = {
        **{f"={index}": one for index, one in enumerate(args)},
        **{f"={name}": one for name, one in kwargs.items()},
    }
    outputs = [{"value": value, "none": None}[one] if one in ("value", "none") else named[one] for one in form.outputs]
    return outputs if form.form == "list" else tuple(outputs)


def values_given(args: Any, kwargs: Any) -> list[tuple[int | str, int | None, torch.Tensor]]:
    """Every tensor of real numbers among the arguments of a call, with its place: the first is the main value."""
    found: list[tuple[int | str, int | None, torch.Tensor]] = []
    for name, argument in [*enumerate(args), *kwargs.items()]:
        if _is_value(argument):
            found.append((name, None, argument))
        elif isinstance(argument, (list, tuple)):
            found += [(name, index, item) for index, item in enumerate(argument) if _is_value(item)]
    return found


def result_of(form: Form, output: Any) -> torch.Tensor:
    """The main value in what a call returned."""
    return output if form.form == "value" else output[form.outputs.index("value")]  # type: ignore[no-any-return]


def with_result(form: Form, output: Any, value: torch.Tensor) -> Any:
    """What a call returned, with another main value."""
    if form.form == "value":
        return value
    place = form.outputs.index("value")
    items = [value if index == place else item for index, item in enumerate(output)]
    return items if form.form == "list" else tuple(items)
