"""Guards: what an opened module's graph was read for, checked each time it runs.

Python control flow on a shape (`if height % 7`) is followed once, with the example's shape. The graph then holds one of
these calls, so that an input that would have taken the other branch raises, and never gets a wrong answer.
"""

from __future__ import annotations

from typing import Any

from torchtrim.errors import GuardError

_CONVERSIONS: dict[str, Any] = {"bool": bool, "int": int, "float": float, "len": len}


def concrete(value: Any, kind: str) -> Any:
    """`value` as Python code asked for it: its truth, its integer or float value, or its length."""
    return _CONVERSIONS[kind](value)


def expect(value: Any, kind: str, expected: Any, where: str, what: str) -> None:
    """Raise unless `value` is what it was when the module at `where` was read.

    Raises:
        GuardError: It is not.

    Example:
        >>> expect(224, "int", 224, "patch_embed", "x.shape[2]")
    """
    found = concrete(value, kind)
    if found != expected:
        raise GuardError(
            f"this module's forward takes another way for this input: {kind} of `{what}` differs",
            path=where or "the model",
            found=found,
            expected=expected,
            hint="edit the original again with an example input of this size",
        )


def expect_argument(value: Any, expected: Any, where: str, name: str) -> None:
    """Raise unless an argument that was fixed when the module was read still has its value.

    Raises:
        GuardError: It has another value.
    """
    if value is expected:
        return
    if type(value) is not type(expected) or value != expected:
        raise GuardError(
            f"argument {name!r} was fixed when this module was opened",
            path=where or "the model",
            found=value if isinstance(value, (bool, int, float, str)) else type(value).__name__,
            expected=expected,
            hint=f"edit the original again with {name!r} in the example inputs",
        )


def expect_given(value: Any, where: str, name: str) -> None:
    """Raise unless an argument that was given when the module was read is given.

    Raises:
        GuardError: It is left out.
    """
    if value is None:
        raise GuardError(
            f"argument {name!r} was given when this module was opened",
            path=where or "the model",
            found="None",
            expected="a tensor",
            hint=f"edit the original again without {name!r} in the example inputs",
        )


def structure(value: Any) -> Any:
    """How an argument is built: the keys of dicts and the lengths of lists, all the way down.

    Example:
        >>> structure({"a": [1, 2]})
        ('dict', ('a', ('list', None, None)))
    """
    if isinstance(value, dict):
        return ("dict", *((key, structure(value[key])) for key in sorted(value, key=str)))
    if isinstance(value, (tuple, list)):
        return ("list", *(structure(item) for item in value))
    return None


def expect_structure(value: Any, expected: Any, name: str) -> None:
    """Raise unless an argument has the keys and lengths that it had when the model was read.

    Raises:
        GuardError: It has others.
    """
    found = structure(value)
    if found != expected:
        raise GuardError(
            f"argument {name!r} is built otherwise than when the model was read",
            path="the model",
            found=found,
            expected=expected,
            hint="edit the original again with an example input of this form",
        )


GUARDS = (expect, expect_argument, expect_structure, expect_given)
