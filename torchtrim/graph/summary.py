"""What a model is made of: the module tree with shapes, parameters and MACs."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from torchtrim.errors import InputError, PathError, nearest
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import Execution, run_if_known
from torchtrim.graph.inputs import ExampleInputs


@dataclass(frozen=True)
class Row:
    """One module of a summary.

    Attributes:
        path: Its path; `""` is the model itself.
        type: Its class name.
        shapes: The shape of each tensor that its first call returned.
        dtypes: Their types.
        params: Parameters in it and below it, a shared one counted once.
        trainable: Those with `requires_grad`.
        macs: MACs spent within it, at batch 1.
        calls: How often one forward calls it; 0 for a container that only holds others, and for what is not used.
        used: Whether the forward calls it or something in it, or reads one of its weights.
        alias_of: The path under which the same module comes first; its numbers stand there.
    """

    path: str
    type: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    params: int
    trainable: int
    macs: int
    calls: int
    used: bool
    alias_of: str | None = None


@dataclass(frozen=True)
class Summary:
    """The rows of a model and its totals. `str()` is a table, `to_dict()` plain data, `rich.print` adds colour.

    Attributes:
        rows: One a module, as they are registered, down to the depth asked for; the first is the model itself.
        inputs: The example inputs in words.
        params: All parameters, shared ones once.
        trainable: Those with `requires_grad`.
        macs: MACs of one forward at batch 1, in eval mode.
        params_mb: Size of the parameters, in MB of a million bytes.
        buffers_mb: Size of the buffers.
        ran: `"fake"` where only shapes were computed, `"real"` where the forward had to be run.
    """

    rows: tuple[Row, ...]
    inputs: str
    params: int
    trainable: int
    macs: int
    params_mb: float
    buffers_mb: float
    ran: str

    @property
    def size_mb(self) -> float:
        """Parameters and buffers, in MB of a million bytes."""
        return self.params_mb + self.buffers_mb

    def __getitem__(self, path: str) -> Row:
        for row in self.rows:
            if row.path == path:
                return row
        raise PathError(
            "the summary has no row of this name",
            path=path,
            found=f"{len(self.rows)} rows",
            hint=nearest(str(path), [row.path for row in self.rows if row.path]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return {**asdict(self), "size_mb": self.size_mb}

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.rows[0].type}({self.inputs})",
            caption=self._totals(),
            title_justify="left",
            caption_justify="left",
        )
        for name, justify in _COLUMNS:
            table.add_column(name, justify=justify, no_wrap=True)
        for row, tree in _drawn(self.rows):
            table.add_row(*self._cells(row, tree), style=None if row.used else "dim")
        return table

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=240, force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name, _ in _COLUMNS)
        body = ""
        for row, tree in _drawn(self.rows):
            cells = "".join(
                f'<td style="white-space:pre;text-align:{justify}">{html.escape(cell)}</td>'
                for cell, (_, justify) in zip(self._cells(row, tree), _COLUMNS, strict=True)
            )
            body += f"<tr{'' if row.used else ' style=opacity:.5'}>{cells}</tr>"
        title = html.escape(f"{self.rows[0].type}({self.inputs})")
        return (
            f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f'<tfoot><tr><td colspan="{len(_COLUMNS)}">{html.escape(self._totals())}</td></tr></tfoot></table>'
        )

    def _cells(self, row: Row, tree: str) -> list[str]:
        if row.alias_of is not None:
            return [tree, row.type, f"is {row.alias_of}", "", "", "", "", ""]
        return [
            tree,
            row.type,
            _shapes(row),
            short(row.params) if row.params else "",
            _share(row.params, self.params) + (_frozen(row) if row.params else ""),
            short(row.macs) if row.macs else "",
            _share(row.macs, self.macs),
            str(row.calls) if row.calls else "" if row.used else "never",
        ]

    def _totals(self) -> str:
        frozen = f" ({short(self.trainable)} trainable)" if self.trainable != self.params else ""
        text = f"{short(self.params)} parameters{frozen}, {short(self.macs)} MACs at batch 1, {self.size_mb:.1f} MB"
        return text + (f" ({self.buffers_mb:.1f} MB buffers)" if self.buffers_mb >= 0.05 else "")


def summary(model: nn.Module, example_inputs: ExampleInputs | None = None, *, depth: int | None = None) -> Summary:
    """Read a model into rows (path, type, output shape, parameters, MACs) and totals.

    Nothing is computed unless the forward depends on values (detection): it runs on fake tensors, so a model of any
    size, also on the meta device, takes no memory. The model is read in eval mode, and left as it was.

    Args:
        model: Any module, whatever it takes and returns.
        example_inputs: What its forward takes: a tensor, or a tuple or dict of them. May be left out once the model's
            history knows it. Shapes are those of this example; MACs are for batch 1.
        depth: Rows down to this many components below the model; all where it is left out.

    Raises:
        InputError: The inputs are missing, or the model refuses them; names the innermost module that did.
        ModelError: The model cannot be read (scripted, sharded, lazy parameters without a shape).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
        >>> read = summary(net, torch.zeros(1, 3, 4, 4))
        >>> read.params, read.macs, read["3"].shapes
        (1514, 4736, ((1, 10),))
    """
    model = unwrap(model)
    execution = run_if_known(model, example_inputs)
    if execution is None:
        raise InputError(
            "example inputs are needed: the model does not say what its forward takes",
            expected="a tensor, or a tuple or dict of them",
            hint="summary(model, torch.zeros(1, 3, 224, 224)), with the shape that the model takes",
        )
    tensors = list(model.parameters())
    return Summary(
        rows=tuple(row for row in _rows(model, execution) if depth is None or _depth(row.path) <= depth),
        inputs=", ".join(map(str, execution.inputs)),
        params=sum(tensor.numel() for tensor in tensors),
        trainable=sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        macs=execution.macs.get("", 0),
        params_mb=_megabytes(tensors),
        buffers_mb=_megabytes(list(model.buffers())),
        ran=execution.ran,
    )


def short(count: float) -> str:
    """A count with its unit.

    Example:
        >>> short(25_557_032), short(640)
        ('25.56 M', '640')
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("module", "left"),
    ("type", "left"),
    ("output", "left"),
    ("params", "right"),
    ("share", "left"),
    ("MACs", "right"),
    ("share", "left"),
    ("calls", "right"),
)


def _rows(model: nn.Module, execution: Execution) -> list[Row]:
    first_name: dict[nn.Module, str] = {}
    rows: list[Row] = []
    macs = _macs(model, execution)
    at_work = {call.path for call in execution.calls} | set(execution.first_use)
    within = {path[:end] for path in at_work for end in (*_dots(path), len(path))} | {""}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = module._get_name()  # an opened module goes by the name of what it was
        if first_name.setdefault(module, path) != path:
            # What is below an alias stands below its first name.
            if _parent(path) is None or first_name[model.get_submodule(_parent(path) or "")] == _parent(path):
                rows.append(Row(path, kind, (), (), 0, 0, 0, 0, True, alias_of=first_name[module]))
            continue
        calls = execution.calls_of(path)
        outputs = calls[0].outputs if calls else ()
        parameters = list(module.parameters())
        rows.append(
            Row(
                path=path,
                type=kind,
                shapes=tuple(value.shape for value in outputs),
                dtypes=tuple(value.dtype for value in outputs),
                params=sum(parameter.numel() for parameter in parameters),
                trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
                macs=macs[path],
                calls=len(calls),
                used=path in within,
            )
        )
    return rows


def _macs(model: nn.Module, execution: Execution) -> dict[str, int]:
    """MACs within each module; for a container that is never called, those of its children."""
    macs: dict[str, int] = {}
    called = {call.path for call in execution.calls}
    names = {module: path for path, module in reversed(list(model.named_modules()))}
    for path, module in reversed(list(model.named_modules())):
        children = sum(macs.get(names[child], 0) for child in module.children())
        macs[path] = execution.macs.get(path, 0) if path in called else children
    return macs


def _drawn(rows: tuple[Row, ...]) -> Iterator[tuple[Row, str]]:
    """Each row with the branches of the tree drawn in front of its name."""
    last: dict[str, str] = {}
    for row in rows:
        if row.path:
            last[_parent(row.path) or ""] = row.path
    for row in rows:
        if not row.path:
            yield row, "model"
            continue
        above = [row.path[:end] for end in _dots(row.path)]
        stems = "".join("   " if last.get(_parent(path) or "") == path else "│  " for path in above)
        branch = "└─ " if last[_parent(row.path) or ""] == row.path else "├─ "
        yield row, stems + branch + row.path.rpartition(".")[2]


def _shapes(row: Row) -> str:
    text = ", ".join(
        str(list(shape)) if dtype == "float32" else f"{dtype}{list(shape)}"
        for shape, dtype in zip(row.shapes[:2], row.dtypes, strict=False)
    )
    return text + (f", +{len(row.shapes) - 2} more" if len(row.shapes) > 2 else "")


def _share(part: int, whole: int) -> str:
    if not part or not whole:
        return ""
    eighths = round(48 * part / whole)
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
    return f"{100 * part / whole:5.1f}% {bar.rstrip()}"


def _frozen(row: Row) -> str:
    return "" if row.trainable == row.params else " frozen" if row.trainable == 0 else " part frozen"


def _dots(path: str) -> list[int]:
    return [index for index, letter in enumerate(path) if letter == "."]


def _parent(path: str) -> str | None:
    return path.rpartition(".")[0] if path else None


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _megabytes(tensors: Sequence[torch.Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
