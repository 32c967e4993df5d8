"""Pre-processing inside an ONNX file: it takes 8-bit pictures, and resizes, crops and normalises by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from torchtrim.errors import ExportError, InputError, MissingDependency
from torchtrim.export.graph import files_of
from torchtrim.export.place import free_place, put_in_place, workshop
from torchtrim.export.preprocessing import Preprocessing

_OPSET = 18  # of the first Resize that has antialias
_MODES = {"bilinear": "linear", "bicubic": "cubic"}
_FLOATS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@dataclass(frozen=True)
class InGraph:
    """A file that prepares pictures by itself.

    Attributes:
        path: The file.
        input_name: Its input: `(batch, height, width, channels)` in uint8, channels in the order of Pillow (RGB).
        does: `everything` (pictures of any size; all of a batch have the same), or `normalise` (cropped pictures).
        largest: Largest difference to the preparation with Pillow, in grey levels of 255, over made-up pictures of
            several sizes.
        mean: The mean difference, in grey levels.
    """

    path: Path
    input_name: str
    does: str
    largest: float
    mean: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        return (
            f"{self.path}: takes 8-bit pictures as {self.input_name!r} and does {self.does}; "
            f"at most {self.largest:.2f} of 255 grey levels from Pillow, {self.mean:.4f} in the mean"
        )


def preprocess_in_graph(
    onnx_path: str | os.PathLike[str],
    path: str | os.PathLike[str],
    preprocessing: Preprocessing,
    *,
    resize: bool = True,
    overwrite: bool = False,
) -> InGraph:
    """Write an ONNX file that takes 8-bit pictures, `(batch, height, width, channels)`, instead of normalised floats.

    The picture is resized in 8 bits with antialiasing, as Pillow does it, cropped, normalised, and turned to
    `(batch, channels, height, width)`. The new nodes are run against Pillow, and how far apart they are is said: about
    one grey level where the picture keeps its shape. Where it is squashed, Pillow may shrink the height first, ONNX
    Runtime always starts with the width, and between the two values are rounded and cut to 8 bits: on noise, and with
    bicubic weights, single values are up to some fifteen levels apart.

    Args:
        onnx_path: The file of a model with one input of pictures.
        path: Where the new file goes.
        preprocessing: What is done to a picture.
        resize: Whether the file resizes and crops. False for a target that has no `Resize` with antialiasing (CUDA's
            and TensorRT's have none): then it takes pictures of the model's own size, and only normalises.
        overwrite: Replace a file that is there.

    Raises:
        ExportError: The file cannot be read, is below opset 18, has more than one input, or the path cannot be written.
        InputError: The pre-processing does not fit the file's input, or is one that ONNX cannot do.

    Example:
        >>> import tempfile, torch
        >>> from torchtrim.export.onnx import export_onnx
        >>> net = torch.nn.Conv2d(3, 2, 8)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = export_onnx(net, torch.zeros(1, 3, 8, 8), f"{place}/net.onnx", benchmark=False)
        ...     how = Preprocessing(crop=(8, 8), resize=10)
        ...     made = preprocess_in_graph(f"{place}/net.onnx", f"{place}/whole.onnx", how)
        >>> made.input_name, made.largest <= 1.5
        ('pictures', True)
    """
    model, entry = read_picture_model(onnx_path)
    check_fits(preprocessing, entry, onnx_path)
    destination = free_place(path, overwrite=overwrite, beside=len(files_of(Path(onnx_path))) > 1)
    does = "everything" if resize else "normalise"
    largest, mean = compared_with_pillow(model, entry, preprocessing, does)
    name = add_nodes(model, entry, preprocessing, does)
    with workshop(destination) as folder:
        made = folder / "made" / destination.name
        try:
            made.parent.mkdir()
            write_model(model, Path(onnx_path), made)
        except OSError as error:
            raise ExportError(f"cannot be written: {error.strerror or error}", path=path) from error
        put_in_place(made, destination, overwrite=overwrite, aside=folder)
    return InGraph(destination, name, does, largest, mean)


def read_picture_model(path: str | os.PathLike[str]) -> tuple[onnx.ModelProto, onnx.ValueInfoProto]:
    """An ONNX file without the weights beside it, and its one input.

    Raises:
        ExportError: It cannot be read, or has another number of inputs.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        raise ExportError("there is no such ONNX file", path=path, hint="export_onnx writes one")
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(os.fspath(path))
    except Exception as error:  # protobuf's and the checker's errors share no base class
        raise ExportError(f"not an ONNX file that is whole: {error}", path=path) from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = [value.name for value in inputs]
        raise ExportError("pictures go into one input", path=path, found=names, expected="one input")
    return model, inputs[0]


def check_fits(preprocessing: Preprocessing, entry: onnx.ValueInfoProto, path: object) -> None:
    """Whether what comes out of the pre-processing is what the model takes.

    Raises:
        InputError: Another shape or type.
    """
    tensor = entry.type.tensor_type
    sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    made = (1, 1 if preprocessing.channels == "L" else 3, *preprocessing.crop)
    fits = len(sizes) == 4 and all(a is None or a == b for a, b in zip(sizes, made, strict=True))
    if not fits or tensor.elem_type not in _FLOATS:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise InputError(
            "the pre-processing does not give what the file takes",
            path=path,
            found=f"float32{list(made)}",
            expected=f"{kind}{[size if size is not None else 'any' for size in sizes]}",
            hint=None if sizes[:1] in ([None], [1]) else "dynamic=True in export_onnx: any batch",
        )


def input_dtype(entry: onnx.ValueInfoProto) -> str:
    """The type of a model's input, as numpy names it."""
    return _FLOATS[entry.type.tensor_type.elem_type]


def write_model(model: onnx.ModelProto, source: Path, place: Path) -> None:
    """Write a changed model, with a copy of the weights that lie beside the file it came from."""
    beside = source.with_name(f"{source.name}.data")
    if beside.is_file():
        for tensor in model.graph.initializer:
            for each in tensor.external_data:
                if each.key == "location":
                    each.value = f"{place.name}.data"
        shutil.copyfile(beside, place.with_name(f"{place.name}.data"))
    place.write_bytes(model.SerializeToString())


def compared_with_pillow(
    model: onnx.ModelProto, entry: onnx.ValueInfoProto, preprocessing: Preprocessing, does: str
) -> tuple[float, float]:
    """Largest and mean difference between the nodes and Pillow, in grey levels of 255, on made-up pictures.

    Raises:
        InputError: ONNX cannot do it.
        ExportError: The opset is too low, or ONNX Runtime cannot run the nodes.
    """
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    graph = alone.graph
    for field in ("node", "initializer", "output", "value_info", "sparse_initializer", "quantization_annotation"):
        graph.ClearField(field)
    output = graph.output.add()
    output.CopyFrom(entry)
    name = add_nodes(alone, graph.input[_position(graph, entry.name)], preprocessing, does)
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise ExportError(f"ONNX Runtime cannot run the pre-processing: {error}") from error
    scale = np.array(preprocessing.std, dtype=np.float32)[:, None, None] * 255
    reference = preprocessing if does == "everything" else replace(preprocessing, resize=None)
    far = []
    for picture in _pictures(preprocessing, does):
        pixels = np.asarray(picture).reshape(1, picture.height, picture.width, -1)
        found = session.run(None, {name: pixels})[0][0].astype(np.float32)
        far.append(np.abs(found - reference.apply(picture)) * scale)
    return float(max(each.max() for each in far)), float(np.mean([each.mean() for each in far]))


def _pictures(preprocessing: Preprocessing, does: str) -> list[Any]:
    """Noise and soft colours, larger and smaller than the input, at odd sizes."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("Pillow is needed to compare with", hint="pip install pillow") from error
    random = np.random.default_rng(0)
    height, width = preprocessing.crop
    sizes = [(height, width)] * 2 if does == "normalise" else [(2 * height + 13, width + 51), (height // 2 + 3, width)]
    mode = "L" if preprocessing.channels == "L" else "RGB"
    made = []
    for rows, columns in sizes:
        noise = Image.fromarray(random.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
        soft = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((columns, rows), 3)
        made += [noise.convert(mode), soft.convert(mode)]
    return made


def add_nodes(model: onnx.ModelProto, entry: onnx.ValueInfoProto, preprocessing: Preprocessing, does: str) -> str:
    """Put the nodes before a model, in place, and give the name of the new input.

    Raises:
        InputError: ONNX cannot do it.
        ExportError: The opset is too low.
    """
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset < _OPSET:
        raise ExportError("Resize has antialiasing since opset 18", found=opset, expected=_OPSET, hint="opset=18")
    graph = model.graph
    written = _Nodes({value.name for value in (*graph.input, *graph.initializer)} | _made(graph.node))
    pictures = written.name("pictures")
    value = pictures
    if does == "everything":
        value = _cropped(written, value, preprocessing)
    value = written.add("Cast", value, to=TensorProto.FLOAT)
    if preprocessing.channels == "BGR":
        value = written.add("Gather", value, written.constant([2, 1, 0]), axis=3)
    std = np.array(preprocessing.std)
    value = written.add("Mul", value, written.constant(1 / (255 * std), np.float32))
    value = written.add("Add", value, written.constant(-np.array(preprocessing.mean) / std, np.float32))
    kind = entry.type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        value = written.add("Cast", value, to=kind)
    written.add("Transpose", value, out=entry.name, perm=[0, 3, 1, 2])
    batch = onnx.TensorShapeProto.Dimension()
    batch.CopyFrom(entry.type.tensor_type.shape.dim[0])
    sizes: list[Any] = [None, *(("height", "width") if does == "everything" else preprocessing.crop)]
    shape = [*sizes, 1 if preprocessing.channels == "L" else 3]
    new = helper.make_tensor_value_info(pictures, TensorProto.UINT8, shape)
    new.type.tensor_type.shape.dim[0].CopyFrom(batch)
    described = graph.value_info.add()
    described.CopyFrom(entry)
    position = _position(graph, entry.name)
    graph.input[position].CopyFrom(new)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*written.nodes, *rest])
    graph.initializer.extend(written.constants)
    return pictures


class _Nodes:
    """Nodes as they are written, with names that are free."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def name(self, wanted: str) -> str:
        number, name = 1, wanted
        while name in self._taken:
            number, name = number + 1, f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        name = self.name("preprocessing.constant")
        self.constants.append(numpy_helper.from_array(np.array(values, dtype=dtype), name))
        return name

    def add(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        name = out or self.name(f"preprocessing.{kind.lower()}")
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=self.name(f"node.{name}"), **attributes))
        return name


def _cropped(written: _Nodes, value: str, preprocessing: Preprocessing) -> str:
    """The middle of a resized picture, in 8 bits."""
    mode, resize, crop = _MODES.get(preprocessing.interpolation), preprocessing.resize, preprocessing.crop
    smallest = (resize, resize) if isinstance(resize, int) else resize
    if mode is None or smallest is None or smallest[0] < crop[0] or smallest[1] < crop[1]:
        raise InputError(
            "this cannot go into the graph",
            found=str(preprocessing),
            expected="bilinear or bicubic, resized to at least the size of the crop",
            hint="resize=False: only the normalisation goes in",
        )
    shape = written.add("Shape", value, start=1, end=3)
    if isinstance(resize, int):  # of the shorter side; rounded down, as torchvision does
        short = written.add("ReduceMin", shape, written.constant([0]), keepdims=1)
        sizes = written.add("Div", written.add("Mul", shape, written.constant([resize])), short)
    elif preprocessing.fit == "cover":
        exact = written.add("Cast", shape, to=TensorProto.DOUBLE)
        ratios = written.add("Div", exact, written.constant(resize, np.float64))
        ratio = written.add("ReduceMin", ratios, written.constant([0]), keepdims=1)
        sizes = written.add("Round", written.add("Div", exact, ratio))
        sizes = written.add("Cast", sizes, to=TensorProto.INT64)
    else:
        sizes = written.constant(resize)
    # Pillow leaves pixels past the edge out of its weights, and its cubic has a = -0.5.
    how: dict[str, Any] = {"cubic_coeff_a": -0.5} if mode == "cubic" else {}
    how |= {"mode": mode, "antialias": 1, "exclude_outside": 1, "axes": [1, 2]}
    value = written.add("Resize", value, "", "", sizes, coordinate_transformation_mode="half_pixel", **how)
    over = written.add("Cast", written.add("Sub", sizes, written.constant(crop)), to=TensorProto.FLOAT)
    halves = written.add("Round", written.add("Mul", over, written.constant(0.5, np.float32)))
    start = written.add("Cast", halves, to=TensorProto.INT64)
    end = written.add("Add", start, written.constant(crop))
    return written.add("Slice", value, start, end, written.constant([1, 2]))


def _made(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    return {name for node in nodes for name in (*node.output, node.name)}


def _position(graph: onnx.GraphProto, name: str) -> int:
    return next(number for number, value in enumerate(graph.input) if value.name == name)
