"""Every error torchtrim raises.

An error says where (`path`), what was found, what was expected, and what to try next. The four are kept as
attributes too, so that a program can act on them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


class TorchTrimError(Exception):
    """Base of all torchtrim errors.

    Args:
        message: What is wrong, in one sentence.
        path: The module path (or file) it is about.
        found: What was there.
        expected: What would have been right.
        hint: The next thing to try.

    Example:
        >>> print(TorchTrimError("the widths differ", path="fc", found=512, expected=256, hint="pass in_features=256"))
        fc: the widths differ (found: 512; expected: 256). Try: pass in_features=256
    """

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.path = path
        self.found = found
        self.expected = expected
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        text = self.message if self.path is None else f"{self.path}: {self.message}"
        details = [
            f"{name}: {value}"
            for name, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        if details:
            text += f" ({'; '.join(details)})"
        if self.hint:
            text += f". Try: {self.hint}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.path, self.found, self.expected, self.hint))


def _rebuild(
    kind: type[TorchTrimError], message: str, path: object, found: object, expected: object, hint: str | None
) -> TorchTrimError:
    return kind(message, path=path, found=found, expected=expected, hint=hint)


class PathError(TorchTrimError):
    """A path that does not exist, is never called, or names several values where one is needed."""


class SelectionError(TorchTrimError):
    """A selection that is empty, or whose count is not the one expected.

    Attributes:
        what: Where nothing fits: what was selected (a path, a glob, a type, a predicate, or a list of these).
        select: Where nothing fits: gives what does in another model.
    """

    what: object = None
    select: Callable[..., list[str]] | None = None


class InputError(TorchTrimError):
    """Example inputs that the model does not accept, or that are missing."""


class TraceError(TorchTrimError):
    """A module whose forward cannot be read as a graph."""


class GuardError(TorchTrimError):
    """An opened module was called in a way its graph was not read for (another size, another optional argument)."""


class EditError(TorchTrimError):
    """An edit that cannot be done on this model."""


class EditTooNew(EditError):
    """A record in a form, or of a kind, that a later version of torchtrim wrote."""


class EditUntrusted(EditError):
    """A record that asks for a class of modules which the caller did not name as trusted."""


class HeadError(EditError):
    """A head that does not fit, or a model whose head cannot be told."""


class CheckFailed(TorchTrimError):
    """An edited or traced model did not compute what the original computes. The result was thrown away."""


class ModelError(TorchTrimError):
    """A model in a state the operation cannot work on (compiled, on the meta device, NaN weights, wrapped)."""


class ExportError(TorchTrimError):
    """An export that could not be made."""


class ExportMismatch(ExportError):
    """An exported file that ran, and disagreed with the PyTorch model."""


class CheckpointError(TorchTrimError):
    """A `.trim` file that cannot be written or read."""


class CheckpointDamaged(CheckpointError):
    """Not a `.trim` file, or one that was cut short or altered."""


class CheckpointTooNew(CheckpointError):
    """A file that a later version of torchtrim wrote, in a form or with edits that this one does not know."""


class CheckpointUntrusted(CheckpointError):
    """A file that asks for code which the caller did not name as trusted."""


class CheckpointMismatch(CheckpointError):
    """A model that is not the one the file describes."""


class RecipeError(TorchTrimError):
    """A recipe that cannot be read, or a key or a value in it that does not belong."""


class MissingDependency(TorchTrimError):
    """An optional package that is needed here and not installed."""


class TorchTrimWarning(UserWarning):
    """Something the user should know of, that is not wrong."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str | None:
    """A hint that lists the names nearest to one that was not found; `None` where nothing is near.

    Example:
        >>> nearest("layer3.conv", ["layer3.conv1", "classifier", "fc"])
        "one of these names: 'layer3.conv1'"
    """
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.6)
    if not close:
        return None
    return "one of these names: " + ", ".join(repr(match) for match in close)
