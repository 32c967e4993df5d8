"""torchtrim: make a pretrained PyTorch model smaller, faster or fit for another task, without breaking it.

The names below are the public API. They are imported when first used, so `import torchtrim` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtrim.autopilot.plans import TrimPlan
    from torchtrim.autopilot.result import Candidate, TrimResult
    from torchtrim.autopilot.trim import trim
    from torchtrim.bench.latency import Benchmark, OnnxFile, benchmark
    from torchtrim.bench.size import SizeReport
    from torchtrim.checkpoint.load import load
    from torchtrim.checkpoint.save import save
    from torchtrim.edits.apply import apply
    from torchtrim.edits.budget import Budget
    from torchtrim.edits.channels import DeleteChannels, delete_channels
    from torchtrim.edits.cluster import ClusterWeights, cluster_weights
    from torchtrim.edits.cut import Cut, cut
    from torchtrim.edits.edit import Edit
    from torchtrim.edits.fuse import FuseBatchNorm, fuse_batchnorm
    from torchtrim.edits.head import AttachHead, attach_head
    from torchtrim.edits.history import History, history
    from torchtrim.edits.insert import Insert, insert
    from torchtrim.edits.module_spec import ModuleSpec
    from torchtrim.edits.plan import Plan, plan
    from torchtrim.edits.prune import PruneChannels
    from torchtrim.edits.remove import Remove, remove
    from torchtrim.edits.replace import Old, Replace, replace
    from torchtrim.edits.replacements import group_norm
    from torchtrim.edits.sparsify import Sparsify, sparsify
    from torchtrim.errors import (
        CheckFailed,
        CheckpointDamaged,
        CheckpointError,
        CheckpointMismatch,
        CheckpointTooNew,
        CheckpointUntrusted,
        EditError,
        EditTooNew,
        EditUntrusted,
        ExportError,
        ExportMismatch,
        GuardError,
        HeadError,
        InputError,
        MissingDependency,
        ModelError,
        PathError,
        RecipeError,
        SelectionError,
        TorchTrimError,
        TorchTrimWarning,
        TraceError,
    )
    from torchtrim.export.compare import Tolerance
    from torchtrim.export.explain import Explanation, explain_onnx
    from torchtrim.export.in_graph import InGraph, preprocess_in_graph
    from torchtrim.export.layers import LayerComparison, compare_layers
    from torchtrim.export.onnx import ExportReport, export_onnx
    from torchtrim.export.preprocessing import Preprocessing
    from torchtrim.export.serving import ServingFolder, write_serving_folder
    from torchtrim.export.verify import Verification, verify_onnx
    from torchtrim.graph.paths import find
    from torchtrim.graph.summary import Summary, summary
    from torchtrim.graph.trace import ModuleGraph, Node, trace
    from torchtrim.importance.activation_stats import ActivationStats, activation_stats
    from torchtrim.importance.matrices import ChannelGroup, GroupTensor
    from torchtrim.importance.rank_blocks import rank_blocks
    from torchtrim.importance.rank_channels import ChannelRanking, rank_channels
    from torchtrim.importance.ranking import Ranked, Ranking
    from torchtrim.models import load_model
    from torchtrim.recipe.recipe import Recipe
    from torchtrim.report.feature_maps import feature_maps
    from torchtrim.report.size import size_report
    from torchtrim.report.trim_report import TrimReport
    from torchtrim.search.prune import prune_channels
    from torchtrim.search.removal_curve import TopDown
    from torchtrim.search.sensitivity import Sensitivity, sensitivity
    from torchtrim.search.top_down import top_down
    from torchtrim.train.distilled import Distilled
    from torchtrim.train.distiller import Distiller
    from torchtrim.train.find_lr import RateTest, find_lr
    from torchtrim.train.finetune import finetune
    from torchtrim.train.freeze import freeze, unfreeze
    from torchtrim.train.gradient_flow import GradientFlow
    from torchtrim.train.gradual_pruning import GradualPruning
    from torchtrim.train.groups import param_groups
    from torchtrim.train.hints import Hint
    from torchtrim.train.magnitude_pruner import MagnitudePruner
    from torchtrim.train.optimizer import Synced, sync_optimizer
    from torchtrim.train.outcome import FineTuning
    from torchtrim.train.quantization import QuantizationAware
    from torchtrim.train.recalibrate import Recalibration, recalibrate_batchnorm
    from torchtrim.train.sparsity import SparsityPenalty
    from torchtrim.train.sparsity_report import SparsityReport
    from torchtrim.train.sparsity_schedule import ConstantSparsity, OneShotSparsity, PolynomialDecay
    from torchtrim.train.teacher_cache import TeacherCache
    from torchtrim.train.trained_ranges import TrainedRanges
    from torchtrim.train.weight_clustering import ClusterReport, WeightClustering

_HOME = {
    "autopilot.plans": ("TrimPlan",),
    "autopilot.result": ("Candidate", "TrimResult"),
    "autopilot.trim": ("trim",),
    "bench.latency": ("Benchmark", "OnnxFile", "benchmark"),
    "bench.size": ("SizeReport",),
    "checkpoint.load": ("load",),
    "checkpoint.save": ("save",),
    "edits.apply": ("apply",),
    "edits.budget": ("Budget",),
    "edits.channels": ("DeleteChannels", "delete_channels"),
    "edits.cluster": ("ClusterWeights", "cluster_weights"),
    "edits.cut": ("Cut", "cut"),
    "edits.edit": ("Edit",),
    "edits.fuse": ("FuseBatchNorm", "fuse_batchnorm"),
    "edits.head": ("AttachHead", "attach_head"),
    "edits.history": ("History", "history"),
    "edits.insert": ("Insert", "insert"),
    "edits.module_spec": ("ModuleSpec",),
    "edits.plan": ("Plan", "plan"),
    "edits.prune": ("PruneChannels",),
    "edits.remove": ("Remove", "remove"),
    "edits.replace": ("Old", "Replace", "replace"),
    "edits.replacements": ("group_norm",),
    "edits.sparsify": ("Sparsify", "sparsify"),
    "errors": (
        "ChannelRanking",
        "CheckFailed",
        "CheckpointDamaged",
        "CheckpointError",
        "CheckpointMismatch",
        "CheckpointTooNew",
        "CheckpointUntrusted",
        "EditError",
        "EditTooNew",
        "EditUntrusted",
        "ExportError",
        "ExportMismatch",
        "GuardError",
        "HeadError",
        "InputError",
        "MissingDependency",
        "ModelError",
        "PathError",
        "RecipeError",
        "SelectionError",
        "TorchTrimError",
        "TorchTrimWarning",
        "TraceError",
    ),
    "export.compare": ("Tolerance",),
    "export.explain": ("Explanation", "explain_onnx"),
    "export.layers": ("LayerComparison", "compare_layers"),
    "export.onnx": ("ExportReport", "export_onnx"),
    "export.in_graph": ("InGraph", "preprocess_in_graph"),
    "export.preprocessing": ("Preprocessing",),
    "export.serving": ("ServingFolder", "write_serving_folder"),
    "export.verify": ("Verification", "verify_onnx"),
    "graph.paths": ("find",),
    "graph.summary": ("Summary", "summary"),
    "graph.trace": ("ModuleGraph", "Node", "trace"),
    "importance.activation_stats": ("ActivationStats", "activation_stats"),
    "importance.matrices": ("ChannelGroup", "GroupTensor"),
    "importance.rank_blocks": ("rank_blocks",),
    "importance.rank_channels": ("ChannelRanking", "rank_channels"),
    "importance.ranking": ("Ranked", "Ranking"),
    "models": ("load_model",),
    "recipe.recipe": ("Recipe",),
    "report.feature_maps": ("feature_maps",),
    "report.size": ("size_report",),
    "report.trim_report": ("TrimReport",),
    "search.prune": ("prune_channels",),
    "search.sensitivity": ("Sensitivity", "sensitivity"),
    "search.removal_curve": ("TopDown",),
    "search.top_down": ("top_down",),
    "train.find_lr": ("RateTest", "find_lr"),
    "train.finetune": ("finetune",),
    "train.freeze": ("freeze", "unfreeze"),
    "train.gradient_flow": ("GradientFlow",),
    "train.gradual_pruning": ("GradualPruning",),
    "train.groups": ("param_groups",),
    "train.magnitude_pruner": ("MagnitudePruner",),
    "train.distilled": ("Distilled",),
    "train.distiller": ("Distiller",),
    "train.hints": ("Hint",),
    "train.optimizer": ("Synced", "sync_optimizer"),
    "train.outcome": ("FineTuning",),
    "train.quantization": ("QuantizationAware",),
    "train.recalibrate": ("Recalibration", "recalibrate_batchnorm"),
    "train.sparsity": ("SparsityPenalty",),
    "train.sparsity_report": ("SparsityReport",),
    "train.sparsity_schedule": ("ConstantSparsity", "OneShotSparsity", "PolynomialDecay"),
    "train.trained_ranges": ("TrainedRanges",),
    "train.weight_clustering": ("ClusterReport", "WeightClustering"),
    "train.teacher_cache": ("TeacherCache",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "ActivationStats",
    "AttachHead",
    "Benchmark",
    "Budget",
    "Candidate",
    "ChannelGroup",
    "ChannelRanking",
    "CheckFailed",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointTooNew",
    "CheckpointUntrusted",
    "ClusterReport",
    "ClusterWeights",
    "ConstantSparsity",
    "Cut",
    "DeleteChannels",
    "Distilled",
    "Distiller",
    "Edit",
    "EditError",
    "EditTooNew",
    "EditUntrusted",
    "Explanation",
    "ExportError",
    "ExportMismatch",
    "ExportReport",
    "FineTuning",
    "FuseBatchNorm",
    "GradientFlow",
    "GradualPruning",
    "GroupTensor",
    "GuardError",
    "HeadError",
    "Hint",
    "History",
    "InGraph",
    "InputError",
    "Insert",
    "LayerComparison",
    "MagnitudePruner",
    "MissingDependency",
    "ModelError",
    "ModuleGraph",
    "ModuleSpec",
    "Node",
    "Old",
    "OneShotSparsity",
    "OnnxFile",
    "PathError",
    "Plan",
    "PolynomialDecay",
    "Preprocessing",
    "PruneChannels",
    "QuantizationAware",
    "Ranked",
    "Ranking",
    "RateTest",
    "Recalibration",
    "Recipe",
    "RecipeError",
    "Remove",
    "Replace",
    "SelectionError",
    "Sensitivity",
    "ServingFolder",
    "SizeReport",
    "Sparsify",
    "SparsityPenalty",
    "SparsityReport",
    "Summary",
    "Synced",
    "TeacherCache",
    "Tolerance",
    "TopDown",
    "TorchTrimError",
    "TorchTrimWarning",
    "TraceError",
    "TrainedRanges",
    "TrimPlan",
    "TrimReport",
    "TrimResult",
    "Verification",
    "WeightClustering",
    "__version__",
    "activation_stats",
    "apply",
    "attach_head",
    "benchmark",
    "cluster_weights",
    "compare_layers",
    "cut",
    "delete_channels",
    "explain_onnx",
    "export_onnx",
    "feature_maps",
    "find",
    "find_lr",
    "finetune",
    "freeze",
    "fuse_batchnorm",
    "group_norm",
    "history",
    "insert",
    "load",
    "load_model",
    "param_groups",
    "plan",
    "preprocess_in_graph",
    "prune_channels",
    "rank_blocks",
    "rank_channels",
    "recalibrate_batchnorm",
    "remove",
    "replace",
    "save",
    "sensitivity",
    "size_report",
    "sparsify",
    "summary",
    "sync_optimizer",
    "top_down",
    "trace",
    "trim",
    "unfreeze",
    "verify_onnx",
    "write_serving_folder",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'torchtrim' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"torchtrim.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
