"""A folder to serve a model from: the ONNX file, its labels and pre-processing, a script that predicts, a README."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx

from torchtrim.bench.table import Table
from torchtrim.errors import ExportError, InputError
from torchtrim.export.in_graph import (
    add_nodes,
    check_fits,
    compared_with_pillow,
    input_dtype,
    read_picture_model,
    write_model,
)
from torchtrim.export.place import workshop
from torchtrim.export.preprocessing import Preprocessing
from torchtrim.export.serving_readme import readme

_OURS = {"README.md", "predict.py", "preprocessing.json", "labels.json", "__pycache__"}
_IN_GRAPH = ("nothing", "normalise", "everything")


class Report(Protocol):
    """What was found of a model: an `ExportReport`, a `Benchmark`."""

    def tables(self) -> tuple[Table, ...]:
        """The figures."""


@dataclass(frozen=True)
class ServingFolder:
    """A folder that a model is served from.

    Attributes:
        path: The folder.
        model: The ONNX file in it.
        files: All files in it.
        input_name: The name of the file's input.
        preprocessing: What is done to a picture.
        in_graph: What of it the file does by itself: `nothing`, `normalise` or `everything`.
        levels: Largest and mean difference between the file's own pre-processing and Pillow's, in grey levels of 255;
            None where it does nothing.
        labels: How many names of classes there are; 0 where there are none.
    """

    path: Path
    model: Path
    files: tuple[Path, ...]
    input_name: str
    preprocessing: Preprocessing
    in_graph: str
    levels: tuple[float, float] | None
    labels: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "path": str(self.path),
            "model": str(self.model),
            "files": [str(file) for file in self.files],
            "input_name": self.input_name,
            "preprocessing": self.preprocessing.to_dict(),
            "in_graph": self.in_graph,
            "levels": None if self.levels is None else list(self.levels),
            "labels": self.labels,
        }

    def table(self) -> Table:
        """What is in it."""
        rows = [
            ("folder", str(self.path)),
            ("files", ", ".join(file.name for file in self.files)),
            ("pictures", str(self.preprocessing)),
            ("in the graph", self.in_graph),
            ("labels", str(self.labels) if self.labels else "none"),
        ]
        if self.levels is not None:
            far = "at most {:.2f}, {:.4f} in the mean, of 255 grey levels".format(*self.levels)
            rows.append(("from Pillow", far))
        return Table("to serve", ("", ""), tuple(rows), left=2)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def write_serving_folder(
    onnx_path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing | Any,
    labels: Sequence[str] | None = None,
    in_graph: str = "nothing",
    output: str | None = None,
    report: Report | None = None,
    overwrite: bool = False,
) -> ServingFolder:
    """Write a folder from which a picture model can be served without PyTorch.

    In it: the ONNX file; `preprocessing.json` and `labels.json`, which the file holds too as the metadata
    `torchtrim.preprocessing` and `torchtrim.labels`; `predict.py`, which needs only onnxruntime, numpy and Pillow and
    prints the five likeliest classes of the pictures it is given; a README. The folder is written beside its place and
    moved there whole: where that fails, nothing is left, and an earlier folder stays.

    Args:
        onnx_path: A file with one input of pictures, `(batch, channels, height, width)`, that takes a batch of one.
        folder: Where it goes; the folder around it must exist.
        preprocessing: What is done to a picture, or anything that `Preprocessing.of` reads.
        labels: The names of the classes, in order: as many as the output has columns.
        in_graph: What the file does by itself: `nothing`; `normalise` (it takes cropped 8-bit pictures); `everything`
            (it takes 8-bit pictures of any size). See `preprocess_in_graph`.
        output: The output that holds the classes; by default the first of the form `(batch, classes)`. The script takes
            its softmax where its rows are no probabilities yet.
        report: What export or benchmark found; its tables go into the README.
        overwrite: Replace a folder that is there, if it holds nothing but what such a folder holds.

    Raises:
        ExportError: The file cannot be read, or the folder is taken or cannot be written.
        InputError: Pre-processing, labels or an output that do not fit the file.

    Example:
        >>> import tempfile, torch
        >>> from torchtrim.export.onnx import export_onnx
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 8), torch.nn.Flatten())
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = export_onnx(net, torch.zeros(1, 3, 8, 8), f"{place}/net.onnx", benchmark=False)
        ...     how = Preprocessing(crop=(8, 8), resize=8)
        ...     made = write_serving_folder(f"{place}/net.onnx", f"{place}/net", preprocessing=how, labels=["a", "b"])
        >>> [file.name for file in made.files]
        ['README.md', 'labels.json', 'net.onnx', 'predict.py', 'preprocessing.json']
    """
    how = Preprocessing.of(preprocessing)
    if in_graph not in _IN_GRAPH:
        raise InputError("unknown in_graph", found=in_graph, expected=", ".join(_IN_GRAPH))
    destination = _free_folder(folder, overwrite)
    model, entry = read_picture_model(onnx_path)
    check_fits(how, entry, onnx_path)
    scores = _scores(model, output, onnx_path)
    names = _checked_labels(labels, scores, onnx_path)
    dtype, input_name, levels = input_dtype(entry), entry.name, None
    if in_graph != "nothing":
        levels = compared_with_pillow(model, entry, how, in_graph)
        input_name = add_nodes(model, entry, how, in_graph)
    source = Path(onnx_path)
    settings = {
        "model": source.name,
        "input": input_name,
        "output": scores.name,
        "layout": "NCHW" if in_graph == "nothing" else "NHWC",
        **how.settings(in_graph=in_graph, dtype=dtype if in_graph == "nothing" else "uint8"),
        "providers": _providers(model),
    }
    _note(model, "torchtrim.preprocessing", json.dumps(settings))
    if names is not None:
        _note(model, "torchtrim.labels", json.dumps(names, ensure_ascii=False))
    # The first table of an export names the file where it was written, which is not where it will be served.
    tables = [table for table in (() if report is None else report.tables()) if table.title != "export"]
    with workshop(destination) as place:
        made = place / "made"
        try:
            made.mkdir()
            write_model(model, source, made / source.name)
            (made / "preprocessing.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            if names is not None:
                text = json.dumps(names, indent=0, ensure_ascii=False)
                (made / "labels.json").write_text(text + "\n", encoding="utf-8")
            shutil.copyfile(Path(__file__).with_name("predict.py"), made / "predict.py")
            text = readme(model, source.name, how, in_graph, levels, names, tables)
            (made / "README.md").write_text(text, encoding="utf-8")
            _put_in_place(made, destination, place / "before")
        except OSError as error:
            raise ExportError(f"the folder cannot be written: {error.strerror or error}", path=folder) from error
    return ServingFolder(
        path=destination,
        model=destination / source.name,
        files=tuple(sorted(destination.iterdir())),
        input_name=input_name,
        preprocessing=how,
        in_graph=in_graph,
        levels=levels,
        labels=len(names or ()),
    )


def _free_folder(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise ExportError("not the path of a folder", found=repr(folder), expected="a str or a Path")
    destination = Path(os.path.abspath(folder))
    if not destination.parent.is_dir():
        raise ExportError("the folder around it does not exist", path=destination.parent, hint="create it first")
    if not os.path.lexists(destination):
        return destination
    if not overwrite:
        raise ExportError("the folder exists already", path=folder, hint="overwrite=True, or another path")
    if destination.is_symlink() or not destination.is_dir():
        raise ExportError("something that is no folder is in the way", path=folder, hint="another path")
    models = [file.name for file in destination.glob("*.onnx")]
    known = {*_OURS, *(name for model in models[:1] for name in (model, f"{model}.data"))}
    others = sorted(file.name for file in destination.iterdir() if file.name not in known)
    if others:
        raise ExportError(
            "the folder holds other files, which would be lost", path=folder, found=others[:5], hint="another path"
        )
    return destination


def _put_in_place(made: Path, destination: Path, aside: Path) -> None:
    """Move a folder to its place; what was there goes aside, and comes back where the move fails."""
    if not destination.exists():
        made.rename(destination)
        return
    destination.rename(aside)
    try:
        made.rename(destination)
    except OSError:
        aside.rename(destination)
        raise


def _scores(model: onnx.ModelProto, output: str | None, path: object) -> onnx.ValueInfoProto:
    """The output that holds the classes."""
    given = list(model.graph.output)
    if output is None:
        return next((value for value in given if len(value.type.tensor_type.shape.dim) == 2), given[0])
    found = next((value for value in given if value.name == output), None)
    if found is None:
        names = [value.name for value in given]
        raise InputError("the file has no such output", path=path, found=output, expected=", ".join(names))
    return found


def _checked_labels(labels: Sequence[str] | None, scores: onnx.ValueInfoProto, path: object) -> list[str] | None:
    if labels is None:
        return None
    if isinstance(labels, str) or not all(isinstance(label, str) and label for label in labels):
        raise InputError("labels are the names of the classes, in order", found=type(labels).__name__)
    sizes = [size.dim_value for size in scores.type.tensor_type.shape.dim]
    if len(sizes) != 2 or (sizes[1] and sizes[1] != len(labels)):
        raise InputError(
            "there is not one label for each column of the output",
            path=path,
            found=f"{len(labels)} labels",
            expected=f"an output (batch, classes), here {sizes}",
        )
    return list(labels)


def _providers(model: onnx.ModelProto) -> list[str]:
    """What should run it: what it was exported for, and the processor where that is missing."""
    notes = {entry.key: entry.value for entry in model.metadata_props}
    wanted = {"cuda": ["CUDAExecutionProvider"], "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider"]}
    return [*wanted.get(notes.get("torchtrim.target", ""), []), "CPUExecutionProvider"]


def _note(model: onnx.ModelProto, key: str, value: str) -> None:
    """Write a note into a model, in place of an earlier one."""
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
            return
    entry = model.metadata_props.add()
    entry.key, entry.value = key, value
