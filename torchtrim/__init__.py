"""torchtrim: make a pretrained PyTorch model smaller, faster or fit for another task, without breaking it.

The names below are the public API. They are imported when first used, so `import torchtrim` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtrim.bench.latency import Benchmark, benchmark
    from torchtrim.edits.apply import apply
    from torchtrim.edits.cut import Cut, cut
    from torchtrim.edits.edit import Edit
    from torchtrim.edits.head import AttachHead, attach_head
    from torchtrim.edits.history import History, history
    from torchtrim.edits.plan import Plan, plan
    from torchtrim.errors import (
        CheckFailed,
        EditError,
        ExportError,
        ExportMismatch,
        GuardError,
        HeadError,
        InputError,
        MissingDependency,
        ModelError,
        PathError,
        SelectionError,
        TorchTrimError,
        TorchTrimWarning,
        TraceError,
    )
    from torchtrim.export.onnx import ExportReport, export_onnx
    from torchtrim.export.verify import Verification, verify_onnx
    from torchtrim.graph.paths import find
    from torchtrim.graph.summary import Summary, summary
    from torchtrim.graph.trace import ModuleGraph, Node, trace
    from torchtrim.train.freeze import freeze, unfreeze
    from torchtrim.train.groups import param_groups

_HOME = {
    "bench.latency": ("Benchmark", "benchmark"),
    "edits.apply": ("apply",),
    "edits.cut": ("Cut", "cut"),
    "edits.edit": ("Edit",),
    "edits.head": ("AttachHead", "attach_head"),
    "edits.history": ("History", "history"),
    "edits.plan": ("Plan", "plan"),
    "errors": (
        "CheckFailed",
        "EditError",
        "ExportError",
        "ExportMismatch",
        "GuardError",
        "HeadError",
        "InputError",
        "MissingDependency",
        "ModelError",
        "PathError",
        "SelectionError",
        "TorchTrimError",
        "TorchTrimWarning",
        "TraceError",
    ),
    "export.onnx": ("ExportReport", "export_onnx"),
    "export.verify": ("Verification", "verify_onnx"),
    "graph.paths": ("find",),
    "graph.summary": ("Summary", "summary"),
    "graph.trace": ("ModuleGraph", "Node", "trace"),
    "train.freeze": ("freeze", "unfreeze"),
    "train.groups": ("param_groups",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "AttachHead",
    "Benchmark",
    "CheckFailed",
    "Cut",
    "Edit",
    "EditError",
    "ExportError",
    "ExportMismatch",
    "ExportReport",
    "GuardError",
    "HeadError",
    "History",
    "InputError",
    "MissingDependency",
    "ModelError",
    "ModuleGraph",
    "Node",
    "PathError",
    "Plan",
    "SelectionError",
    "Summary",
    "TorchTrimError",
    "TorchTrimWarning",
    "TraceError",
    "Verification",
    "__version__",
    "apply",
    "attach_head",
    "benchmark",
    "cut",
    "export_onnx",
    "find",
    "freeze",
    "history",
    "param_groups",
    "plan",
    "summary",
    "trace",
    "unfreeze",
    "verify_onnx",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'torchtrim' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"torchtrim.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
