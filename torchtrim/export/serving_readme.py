"""The README of a folder that a model is served from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from torchtrim.bench.table import Table
from torchtrim.export.preprocessing import Preprocessing

_DOES = {
    "nothing": "The script does this with Pillow and numpy.",
    "normalise": "The file takes 8-bit pictures that are resized and cropped, and does the rest by itself.",
    "everything": "The file takes 8-bit pictures of any size and does all of this by itself.",
}


def readme(
    model: onnx.ModelProto,
    file: str,
    preprocessing: Preprocessing,
    in_graph: str,
    levels: tuple[float, float] | None,
    labels: Sequence[str] | None,
    tables: Sequence[Table],
) -> str:
    """What the model is, what goes in and comes out, how to run it, and what was found of it.

    Args:
        model: The model, without weights that lie beside it.
        file: The name of its file.
        preprocessing: What is done to a picture.
        in_graph: What of it the file does.
        levels: How far that is from Pillow, in grey levels.
        labels: The names of the classes.
        tables: Figures.
    """
    notes = {entry.key: entry.value for entry in model.metadata_props}
    facts = [("`" + file + "`", "the model, an ONNX file")]
    facts.append(("`preprocessing.json`", "how a picture is prepared; in the file too, as `torchtrim.preprocessing`"))
    if labels is not None:
        said = f"the names of the {len(labels)} classes; in the file too, as `torchtrim.labels`"
        facts.append(("`labels.json`", said))
    facts.append(("`predict.py`", "prints the five likeliest classes of pictures"))
    weights = {tensor.name for tensor in model.graph.initializer}
    values = [("input", value) for value in model.graph.input if value.name not in weights]
    values += [("output", value) for value in model.graph.output]
    described = [(kind, f"`{value.name}`", _shape(value)) for kind, value in values]
    made = ", ".join(f"{key.removeprefix('torchtrim.')} {notes[key]}" for key in _MADE if key in notes)
    opset = next((str(each.version) for each in model.opset_import if each.domain in ("", "ai.onnx")), "")
    parts = [
        f"# {Path(file).stem}",
        f"Written by {model.producer_name or 'an unknown tool'} {model.producer_version}".rstrip()
        + f": opset {opset}{', ' + made if made else ''}.",
        Table("", ("file", ""), tuple(facts), left=2).markdown(),
        "## Run it",
        "```bash\npip install onnxruntime numpy pillow\npython predict.py cat.jpg dog.png\n```",
        "## What goes in and comes out",
        Table("", ("", "name", "type"), tuple(described), left=3).markdown(),
        f"Pictures: {preprocessing}. {_DOES[in_graph]}",
    ]
    if levels is not None:
        far = "At most {:.2f} of 255 grey levels from what Pillow gives, {:.4f} in the mean, on made-up pictures."
        parts.append(far.format(*levels))
    if tables:
        parts += ["## What was found", *(table.markdown() for table in tables)]
    return "\n\n".join(parts) + "\n"


_MADE = ("torchtrim.target", "torchtrim.quantize")


def _shape(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [size.dim_param or str(size.dim_value) for size in tensor.shape.dim]
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} ({', '.join(sizes)})"
