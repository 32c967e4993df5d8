"""Names that Python source can hold: `torch.fx` writes the names in a graph into source, which it then runs.

It puts a name that is no identifier between quotes without a look at what is in it. A name may come from a file, so
one that would end the string, and run as code, must never get there.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Iterable
from typing import Any

from torch import fx

from torchtrim.errors import TraceError


def is_writable(name: str) -> bool:
    """Whether a member's name (one part of a path) means that member in the source that `torch.fx` writes.

    Example:
        >>> is_writable("conv1"), is_writable("0"), is_writable("1x1 conv"), is_writable('a"'), is_writable("class")
        (True, True, True, False, False)
    """
    if name.isidentifier():
        return _is_plain(name)
    return name.isprintable() and '"' not in name and "\\" not in name


def unwritable(op: str, target: Any, names: Iterable[str] = ()) -> str | None:
    """Why a call cannot be written as source; `None` where it can.

    Args:
        op: As of a node of a graph.
        target: Likewise.
        names: Those of the arguments that are given by name.
    """
    if op == "placeholder":
        wrong = [name for name in (target.lstrip("*"),) if not (name.isidentifier() and _is_plain(name))]
    elif isinstance(target, str):
        wrong = [part for part in target.split(".") if not is_writable(part)]
    else:
        wrong = []
    wrong += [name for name in names if not (name.isidentifier() and _is_plain(name))]
    return f"a name that Python source cannot hold: {wrong[0][:60]!r}" if wrong else None


def check_writable(graph: fx.Graph) -> None:
    """Refuse a graph that must not become source.

    Raises:
        TraceError: A name in it cannot be written.
    """
    for node in graph.nodes:
        reason = unwritable(node.op, node.target, node.kwargs)
        if reason is not None:
            raise TraceError(reason, hint="another name for that module or argument")


def _is_plain(name: str) -> bool:
    # Python takes some letters for others: such a name would be read as another.
    return not keyword.iskeyword(name) and (name.isascii() or unicodedata.normalize("NFKC", name) == name)
