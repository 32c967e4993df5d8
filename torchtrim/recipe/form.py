"""The form of a recipe: its sections and keys, and what is said of a wrong one."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from torchtrim.errors import RecipeError, nearest

FORM_VERSION = 1


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _short(key: str) -> BeforeValidator:
    """A section that may be written as the value of its first key alone."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class ModelSection(_Section):
    """Which model to start from."""

    name: Annotated[str, Field(description="timm:NAME, torchvision:NAME, package.module:function or a .trim file.")]
    pretrained: Annotated[bool, Field(description="Load the weights its authors trained.")] = False
    weights: Annotated[str | None, Field(description="A file with a state_dict to load into it.")] = None
    seed: Annotated[int, Field(description="Seed of the initial weights.", ge=0, lt=2**32)] = 0
    arguments: Annotated[dict[str, Any], Field(description="Keyword arguments for what builds the model.")] = {}


def _onnx_name(value: Any) -> Any:
    if not re.fullmatch(r"[^/\\]+\.onnx", str(value)):
        raise ValueError("the name of a file in the run's folder, and it ends in .onnx")
    return value


def _dtype(value: Any) -> Any:
    if not isinstance(getattr(torch, str(value), None), torch.dtype):
        raise ValueError("not a type of values such as float32 or int64")
    return value


class TensorSection(_Section):
    """The shape of one input, batch first, and its type."""

    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(description="Batch first: [1, 3, 224, 224].")]
    dtype: Annotated[str, BeforeValidator(_dtype), Field(description="float32, int64, ...")] = "float32"


class DataSection(_Section):
    """Data in a file or a folder."""

    file: Annotated[
        str, Field(description="A .npz, .npy or .pt file, a folder of pictures, or torchvision:CIFAR10:FOLDER[:test].")
    ]
    inputs: Annotated[
        str | list[str] | dict[str, str] | None,
        Field(description="Names of the arrays the model takes; {argument: array} for keyword arguments."),
    ] = None
    targets: Annotated[str | None, Field(description="The name of the array of labels.")] = None
    batch: Annotated[int, Field(description="Rows in a batch.", ge=1)] = 32
    limit: Annotated[int | None, Field(description="Use this many rows, spread evenly over the data.", ge=1)] = None
    mean: Annotated[list[float] | None, Field(description="Mean of each channel of pictures, from 0 to 1.")] = None
    std: Annotated[list[float] | None, Field(description="Deviation of each channel of pictures.")] = None


def _learning(value: Any) -> Any:
    names = ("all", "head", "gradual")
    if isinstance(value, Mapping):
        if not all(isinstance(key, int) and key >= 0 for key in value):
            raise ValueError("epochs, from 0 on, and what learns from each: {0: head, 2: layer4, 3: all}")
    elif value is not None and value not in names:
        raise ValueError(f"{', '.join(names)}, or epochs and what learns from each: {{0: head, 2: layer4}}")
    return value


class DistillSection(_Section):
    """What is learnt from the teacher."""

    temperature: Annotated[float, Field(description="Of the soft targets.", gt=0)] = 4.0
    alpha: Annotated[float, Field(description="The share of the teacher's part in the loss.", ge=0, le=1)] = 0.5
    hints: Annotated[
        Literal["auto"] | dict[str, str] | None,
        Field(description="auto, {student's path: teacher's path} or null: features to imitate."),
    ] = "auto"


class TrainingSection(_Section):
    """A training of the edited model: `torchtrim.finetune`."""

    data: Annotated[DataSection, _short("file"), Field(description="Labelled data.")]
    validation: Annotated[DataSection | None, _short("file"), Field(description="Labelled data to measure on.")] = None
    epochs: Annotated[int, Field(description="Passes over the data.", ge=1)] = 1
    lr: Annotated[float, Field(description="The largest learning rate.", gt=0)] = 1e-3
    schedule: Annotated[Literal["cosine", "linear", "constant", "plateau"], Field(description="How the rate goes.")] = (
        "cosine"
    )
    warmup: Annotated[float, Field(description="Steps, or below 1 a share of all, in which it rises.", ge=0)] = 0.0
    optimizer: Annotated[Literal["adamw", "sgd"], Field(description="The optimizer.")] = "adamw"
    weight_decay: Annotated[float, Field(description="Weight decay of weights (not of biases and norms).", ge=0)] = 0.05
    layer_decay: Annotated[float, Field(description="Factor from each layer's rate to the one before.", gt=0, le=1)] = (
        1.0
    )
    freeze_upto: Annotated[str | None, Field(description="Hold all up to the end of this module.")] = None
    unfreeze: Annotated[
        str | dict[int, str | list[str]] | None,
        BeforeValidator(_learning),
        Field(description="all, head, gradual, or epochs and what learns from each: {0: head, 2: layer4, 3: all}."),
    ] = None
    label_smoothing: Annotated[float, Field(description="Of the cross-entropy.", ge=0, lt=1)] = 0.0
    mixup: Annotated[float | None, Field(description="The alpha of mixup.", gt=0)] = None
    accumulate: Annotated[int, Field(description="Batches of one step.", ge=1)] = 1
    clip_norm: Annotated[float | None, Field(description="The largest norm of a step's gradients.", gt=0)] = None
    ema: Annotated[float | None, Field(description="Decay of an average of the weights.", ge=0, lt=1)] = None
    precision: Annotated[Literal["bf16", "fp16"] | None, Field(description="Mixed precision.")] = None
    patience: Annotated[int | None, Field(description="End after so many epochs that were no better.", ge=1)] = None
    keep: Annotated[
        Literal["best", "last"] | None, Field(description="Which epoch's weights; the best where there is validation.")
    ] = None
    teacher: Annotated[
        Literal["original"] | None, Field(description="original: imitate the model as it was before the edits.")
    ] = None
    distill: Annotated[DistillSection | None, Field(description="How, where there is a teacher.")] = None
    seed: Annotated[int, Field(description="Seed of the order of the rows and of dropout.", ge=0, lt=2**32)] = 0


class ExportSection(_Section):
    """The ONNX file."""

    file: Annotated[str, BeforeValidator(_onnx_name), Field(description="Its name in the run's folder.")] = "model.onnx"
    target: Annotated[str, Field(description="Where it will run: cpu, openvino, cuda or tensorrt.")] = "cpu"
    quantize: Annotated[
        str | None,
        Field(description="dynamic, static, weight_only, mixed, fp16, bf16, float32; auto: the fastest that is right."),
    ] = None
    calibration: Annotated[
        str, Field(description="How static int8 chooses ranges: minmax, entropy, percentile, mse.")
    ] = "minmax"
    max_drop: Annotated[float, Field(description="How much accuracy mixed and auto may lose.", ge=0, le=1)] = 0.01
    bits: Annotated[int, Field(description="Of the weights in weight_only: 8 or 4.")] = 8
    opset: Annotated[int | None, Field(description="The ONNX opset.", ge=1)] = None
    dynamic: Annotated[bool, Field(description="Whether it takes any batch size.")] = True
    tolerance: Annotated[float | None, Field(description="How far it may be from the model, relative.", gt=0)] = None
    benchmark: Annotated[bool, Field(description="Measure its latency.")] = True


def _inputs(value: Any) -> Any:
    """Every way to say the inputs, as a list (positional) or a dict (by name) of tensors."""

    def one(item: Any) -> Any:
        return {"shape": item} if isinstance(item, list) else item

    if isinstance(value, Mapping) and "shape" not in value:
        return {name: one(item) for name, item in value.items()}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [one(item) for item in value]
    return value if value is None else [one(value)]


class RecipeForm(_Section):
    """A model, what is done to it, and what is written."""

    recipe: Annotated[int, Field(description="The version of this form.", ge=1)] = FORM_VERSION
    model: Annotated[ModelSection, _short("name")]
    input: Annotated[
        list[TensorSection] | dict[str, TensorSection] | None,
        BeforeValidator(_inputs),
        Field(description="Shapes of the example inputs; what the model's own configuration says where left out."),
    ] = None
    data: Annotated[
        DataSection | None, _short("file"), Field(description="Calibration data: for healing, and to compare on.")
    ] = None
    edits: Annotated[list[Any], Field(description="What is done to the model, in this order.")] = []
    head: Annotated[dict[str, Any] | None, Field(description="A new head, after all edits.")] = None
    training: Annotated[TrainingSection | None, Field(description="Training of what the edits gave.")] = None
    export: Annotated[ExportSection | None, Field(description="The ONNX file; null for none.")] = ExportSection()
    out: Annotated[str | None, Field(description="The folder that the run writes; the recipe's name by default.")] = (
        None
    )


def checked(data: Any, where: str | None = None) -> RecipeForm:
    """A recipe's plain data, checked.

    Args:
        data: What the file holds.
        where: The file, for messages.

    Raises:
        RecipeError: A key or a value does not belong; says which, and what was meant.

    Example:
        >>> checked({"model": {"name": "timm:resnet18", "pretraned": True}})
        Traceback (most recent call last):
        torchtrim.errors.RecipeError: model.pretraned: no such key (expected: name, pretrained, weights, seed, \
arguments). Try: one of these names: 'pretrained'
    """
    if not isinstance(data, Mapping):
        raise RecipeError("a recipe is sections by name", path=where, found=type(data).__name__, expected="model: ...")
    version = data.get("recipe", FORM_VERSION)
    if type(version) is not int or version != FORM_VERSION:
        newer = type(version) is int and version > FORM_VERSION
        raise RecipeError(
            "a recipe in a form that this version does not know",
            path="recipe",
            found=version,
            expected=FORM_VERSION,
            hint="a newer torchtrim" if newer else None,
        )
    try:
        return RecipeForm.model_validate(dict(data))
    except ValidationError as error:
        raise _told(error) from error


def _told(error: ValidationError) -> RecipeError:
    """The first thing that is wrong; of a value of several forms, what is wrong with the one that went deepest."""
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    same = [problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1]]
    first = unknown[0] if unknown else max(same, key=lambda problem: len(problem["loc"]))
    place = tuple(part for part in first["loc"] if not _is_branch(part))
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if first["type"] == "extra_forbidden":
        names = keys_at(place[:-1])
        hint = nearest(str(place[-1]), names) if names else None
        return RecipeError("no such key", path=path, expected=", ".join(names), hint=hint)
    if first["type"] == "missing":
        return RecipeError("this key is needed", path=path)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = re.sub("a valid dictionary or instance of \\w+", "keys and values", message)
    return RecipeError(message[:1].lower() + message[1:], path=path, found=repr(first["input"])[:80])


def _is_branch(part: Any) -> bool:
    """Whether a part of a place is not a key, but pydantic's name for one of several forms: `list[str]`."""
    return isinstance(part, str) and bool(re.match(r"(list|dict)\[|function-|str$|int$", part))


def keys_at(place: tuple[Any, ...]) -> list[str]:
    """The keys that a recipe may have at a place; none where anything goes.

    Example:
        >>> keys_at(("input", 0))
        ['shape', 'dtype']
    """
    found: Any = RecipeForm
    for part in place:
        choices = _choices(found)
        section = next((each for each in choices if _is_section(each) and part in each.model_fields), None)
        holders = [each for each in choices if get_origin(each) in (list, dict)]
        if section is not None:
            found = section.model_fields[part].annotation
        elif holders:
            found = get_args(holders[-1 if isinstance(part, str) else 0])[-1]
        else:
            return []
    return [name for each in _choices(found) if _is_section(each) for name in each.model_fields]


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for arg in get_args(annotation) for choice in _choices(arg)]
    return [annotation]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
