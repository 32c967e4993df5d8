"""A recipe to begin with: it runs as it is, and says in comments what else it could hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from torchtrim.graph.execution import run_fake, spec_of
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.summary import short, summary
from torchtrim.recipe.folder import to_yaml

_TEXT = """\
# A torchtrim recipe. It runs as it is:    torchtrim run {file}
# What its edits would do, without them:   torchtrim run {file} --plan
# One value changed for one run:           torchtrim run {file} --set model.pretrained=true
# A schema for editors:                    torchtrim recipe schema

recipe: 1                       # the version of this form

model:                          # {about}
  name: {name}
  pretrained: {pretrained}             # true: the weights its authors trained
  seed: 0                       # of the initial weights
  # weights: weights.pt         # a state_dict to load; paths start at this file's folder
  # arguments: {{drop_rate: 0.1}} # keyword arguments for what builds the model

{input}
# data:                         # calibration data: for healing, and to compare the ONNX file on
#   file: pictures/             # a folder of pictures, or a .npz, .npy or .pt file
#   limit: 256

edits: []                       # what is done to the model, in this order; instead of [], for example:
{edits}
# head: {{num_classes: 10, dropout: 0.1}} # a new head, after all edits

# training:                     # of the result; needs torchtrim[train]
#   data: {{file: train/}}        # a folder of pictures for each class, or {{file: train.npz, targets: labels}}
#   validation: {{file: val/}}
#   epochs: 3
#   lr: 1.0e-3
#   schedule: cosine            # or linear, constant, plateau
#   optimizer: adamw            # or sgd
#   unfreeze: {{0: head, 1: all}} # or all, head, gradual
#   freeze_upto: {frozen}

export:                         # the ONNX file; null for none
  file: model.onnx
  target: cpu                   # or cuda
  # quantize: dynamic           # int8 weights in the linear layers
  # opset: 20
"""


def new_recipe(
    name: str, model: nn.Module, inputs: Inputs, *, pretrained: bool = False, file: str = "recipe.yaml"
) -> str:
    """The text of a commented recipe for a model.

    Args:
        name: The model's name, as a recipe gives it.
        model: The model, for paths to show.
        inputs: Its example inputs.
        pretrained: Start from the weights its authors trained.
        file: The name the recipe will be saved under.

    Raises:
        InputError: The model refuses the inputs.

    Example:
        >>> import torch
        >>> text = new_recipe("own:net", nn.Sequential(nn.Linear(4, 2)), Inputs.of(torch.zeros(1, 4)))
        >>> print(*(line for line in text.splitlines() if line.startswith(("  name", "input"))), sep="\\n")
          name: own:net
        input: [1, 4]                   # batch first
    """
    cost = summary(model, inputs)
    shapes = spec_of(inputs)
    paths = _blocks(model, inputs)
    return _TEXT.format(
        file=file,
        name=to_yaml(name).removesuffix("\n").removesuffix("\n..."),
        about=f"{short(cost.params)} parameters, {short(cost.macs)} MACs",
        pretrained=str(pretrained).lower(),
        input=_input(shapes),
        edits=_examples(paths),
        frozen=paths[len(paths) // 2],
    )


def _input(shapes: dict[str, Any]) -> str:
    given = shapes["args"] or shapes["kwargs"]
    if not shapes["kwargs"] and len(given) == 1 and given[0]["dtype"] == "float32":
        line = f"input: {given[0]['shape']}"
        return f"{line:<32}# batch first\n"
    return to_yaml({"input": given})


def _examples(paths: Sequence[str]) -> str:
    early, middle, last = paths[len(paths) // 3], paths[len(paths) // 2], paths[-1]
    lines = [
        ("cut: {after: " + last + "}", "keep what leads to it"),
        ("remove: {paths: [" + middle + "]}", "take it out of the middle"),
        ('insert: {module: "nn.Dropout(0.2)", after: ' + early + "}", "put a layer in"),
        ('replace: {what: "nn.ReLU", new: "nn.ReLU6()"}', "by type, path or glob"),
    ]
    return "".join(f"#   - {text:<55} # {meaning}\n" for text, meaning in lines)


def _blocks(model: nn.Module, inputs: Inputs) -> list[str]:
    """Paths of large parts, in the order of execution: what is called two levels down, or else at all."""
    called = list(dict.fromkeys(call.path for call in run_fake(model, inputs).calls if call.path))
    large = [path for path in called if any(True for _ in model.get_submodule(path).children())]
    for paths in ([path for path in large if path.count(".") <= 1], large, called):
        if len(paths) >= 2:
            return paths
    return called or ["PATH"]
