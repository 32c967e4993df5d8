"""What is tried on one model: prune half of its channels, and see whether what comes back is right.

Nothing here relies on the checks that pruning makes: the network is run and trained, its MACs are counted anew, and it
is compared with the original whose removed channels are zero. Its ONNX file is verified as users verify theirs.
"""

from __future__ import annotations

import gc
import io
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prune_zoo_masked import check_slices, compare
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from zoo_models import build, stir

import torchtrim as tt
from torchtrim.graph.check import flatten

STEPS = ("build", "prune", "run", "macs", "truth", "equal", "replay", "onnx", "timm")
ENGINES = {"torchtrim": STEPS, "torch-pruning": ("build", "prune", "run", "macs")}
ENGINE_GB = 4.0  # what pruning may take above the model and its first forward
CLASSES = 7


class Wrong(Exception):
    """A step gave something that is not right."""


def try_all(
    name: str,
    report: Callable[[str, dict[str, Any]], None],
    engine: str,
    ratio: float,
    round_to: int,
    leave_out: tuple[str, ...] = (),
) -> None:
    """Run the steps of one engine on one model, and report each: seconds, what was found, any error."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work = _Work(name, engine, ratio, round_to)
    for step in ENGINES[engine]:
        if step in leave_out or (step == "timm" and not name.startswith("timm:")):
            continue
        began = time.perf_counter()
        found: dict[str, Any] = {}
        try:
            found = getattr(work, step)()
        except Exception as error:  # noqa: BLE001 (whatever is raised is the result)
            found["error"] = f"{type(error).__name__}: {error}"[:900]
            if not isinstance(error, (Wrong, tt.TorchTrimError)):
                found["traceback"] = traceback.format_exc().splitlines()[-12:]
        found["took"] = round(time.perf_counter() - began, 2)
        report(step, found)
        if step in ("build", "prune") and "error" in found:
            return


class _Work:
    model: nn.Module
    net: nn.Module
    x: torch.Tensor

    def __init__(self, name: str, engine: str, ratio: float, round_to: int) -> None:
        self.name, self.engine, self.ratio, self.round_to = name, engine, ratio, round_to

    def build(self) -> dict[str, Any]:
        self.model, self.x = _built(self.name)
        self.shapes = {batch: _shapes(self.model, self._inputs(batch), batch) for batch in (1, 2, 3)}
        self.trained = _gradients(self.model.train(), self._inputs(2))
        self.model.eval()
        self.whole = count_macs(self.model, self.x)
        return {"input": list(self.x.shape), "params": _count(self.model), "macs": self.whole}

    def _inputs(self, batch: int) -> torch.Tensor:
        torch.manual_seed(batch)
        return torch.randn(batch, *self.x.shape[1:])

    def prune(self) -> dict[str, Any]:
        before, memory = _state(self.model), Memory()
        began = time.process_time()
        if self.engine == "torch-pruning":
            plain_pruner(self.model, self.x, self.ratio, self.round_to).step()
            self.net = self.model
        else:
            self.net = tt.prune_channels(self.model, self.x, self.ratio, round_to=self.round_to)
        found: dict[str, Any] = {"seconds": round(time.process_time() - began, 2), **memory.told()}
        if self.engine == "torch-pruning":
            return found
        entry = tt.history(self.net).entries[-1]
        found |= {"params": _count(self.net), "notes": list(entry.notes), "left_alone": left_alone(entry)}
        if _state(self.model) != before:
            raise Wrong("the user's model was changed")
        if found["engine_mb"] > ENGINE_GB * 1000:
            found["error"] = f"it took {found['engine_mb']} MB above the model"
        return found

    def run(self) -> dict[str, Any]:
        """Forward in both modes at several batch sizes, and backward: shapes, and which parameters learn."""
        self.net.eval()
        for batch, expected in self.shapes.items():
            found = _shapes(self.net, self._inputs(batch), batch)
            for mode, shapes in expected.items():
                if shapes != found[mode]:
                    raise Wrong(f"in {mode} mode at batch {batch} the outputs are {found[mode]}, not {shapes}")
        trained = _gradients(self.net.train(), self._inputs(2))
        _gradients(self.net, self._inputs(3))
        self.net.eval()
        lost = sorted(name for name in self.trained - trained if name in dict(self.net.named_parameters()))
        if lost:
            raise Wrong(f"parameters get no gradient any more: {lost[:5]}")
        return {}

    def macs(self) -> dict[str, Any]:
        left = count_macs(self.net, self.x)
        return {"macs": left, "share": round(left / self.whole, 4), "params": _count(self.net)}

    def truth(self) -> dict[str, Any]:
        """Every attribute of torch's own layers that counts channels, and what timm says of the features."""
        for path, module in self.net.named_modules():
            for name, said, found in _counts(module):
                if said != found:
                    raise Wrong(f"{path}.{name} says {said}, and it is {found}")
        wrong = [
            f"{info['module']}: {said} said, {found} found"
            for info, said, found in _features(self.model, self.net, self.x)
            if said != found
        ]
        if wrong:
            raise Wrong(f"feature_info: {'; '.join(wrong[:4])}")
        return {}

    def equal(self) -> dict[str, Any]:
        removed = removed_in(tt.history(self.net).entries[-1].edit)
        wrong = check_slices(self.model, self.net, removed)
        if wrong:
            raise Wrong(wrong)
        found = compare(self.model, self.net, removed, self._inputs(2))
        if found["verdict"] == "differs":
            found["error"] = f"not the masked original: {found}"
        return found

    def replay(self) -> dict[str, Any]:
        """The record alone gives the same network, to the bit, from a fresh model."""
        del self.model
        gc.collect()
        fresh, _ = _built(self.name)
        again = tt.apply(fresh, self.x, tt.history(self.net).edits, check=False)
        held, other = self.net.state_dict(), again.state_dict()
        if list(held) != list(other):
            raise Wrong("the record gives other tensors")
        for name, tensor in held.items():
            if tensor.shape != other[name].shape:
                raise Wrong(f"the record gives {name} as {list(other[name].shape)}, not {list(tensor.shape)}")
        names = dict(self.net.named_parameters())
        if any(not torch.equal(tensor, other[name]) for name, tensor in held.items() if name in names):
            raise Wrong("the record gives other values")
        buffer = io.BytesIO()
        torch.save(tt.history(self.net).to_json(), buffer)
        return {"record_kb": buffer.tell() // 1000}

    def onnx(self) -> dict[str, Any]:
        """An ONNX file that agrees with PyTorch."""
        self.net.eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                checked = tt.export_onnx(self.net, self.x, path, benchmark=False).verification
            except tt.ExportError as error:
                original, _ = _built(self.name)
                try:
                    tt.export_onnx(original, self.x, path, benchmark=False)
                except tt.ExportError:
                    return {"note": "the original cannot be exported either", "why": str(error)[:300]}
                raise
        return {"relative": max(output.relative for output in checked.outputs), "batches": list(checked.batches)}

    def timm(self) -> dict[str, Any]:
        """timm's own methods tell the truth, and work."""
        original, x = build(self.name)[0], self._inputs(2)
        net: Any = self.net.eval()
        with torch.no_grad():
            before, after = original.forward_features(x), net.forward_features(x)
        if isinstance(before, torch.Tensor) and isinstance(getattr(original, "num_features", None), int):
            axes = [axis for axis in range(1, before.dim()) if before.shape[axis] == original.num_features]
            if len(axes) == 1 and after.shape[axes[0]] != net.num_features:
                raise Wrong(f"num_features says {net.num_features}, and there are {after.shape[axes[0]]} features")
        try:
            original.reset_classifier(CLASSES)
            expected = original(x).shape
        except Exception as error:  # noqa: BLE001 (a model of timm that cannot do it by itself)
            return {"reset_classifier": f"the original raises {type(error).__name__}"}
        net.reset_classifier(CLASSES)
        if net(x).shape != expected:
            raise Wrong(f"after reset_classifier the output is {list(net(x).shape)}, not {list(expected)}")
        _gradients(net.train(), x)
        return {}


def _built(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model with a head, and noise on all that would be one value throughout."""
    model, x = build(name, headed=True)
    stir(model)
    return model, x


def plain_pruner(model: nn.Module, x: torch.Tensor, ratio: float, round_to: int) -> Any:
    """torch-pruning as its guide says: group magnitude, and the layers of as many outputs as the model protected."""
    import torch_pruning as tp

    with torch.no_grad():
        classes = next(iter(flatten(model(x)).values())).shape[-1]
    heads: list[nn.Module] = [
        module
        for module in model.modules()
        if getattr(module, "out_features", getattr(module, "out_channels", None)) == classes
    ]
    return tp.pruner.BasePruner(
        model,
        (x,),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=heads,
        round_to=round_to or None,
        num_heads={},
        channel_groups={},
    )


def removed_in(edit: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each tensor that the record names, the indices that went from each of its dimensions."""
    return dict(edit.narrowed)


def left_alone(entry: Any) -> dict[str, str]:
    """The layers that were left alone, and why, as the record says."""
    return dict(entry.edit.pruned.left_alone)


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """MACs of one forward in eval mode at batch 1, by the formulas of torch's own counter, with no operator fused."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
            model(x[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """`FlopCounterMode` without its bookkeeping by module, which some forwards do not bear."""

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class Memory:
    """The peak of this process from now on, above what it holds now (Linux: the high-water mark is set back)."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status("VmRSS")

    def told(self) -> dict[str, int]:
        peak = _status("VmHWM")
        return {"engine_mb": (peak - self.before) // 1000, "process_mb": peak // 1000}


def _status(key: str) -> int:
    """A line of this process's status, in kB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _shapes(model: nn.Module, x: torch.Tensor, batch: int) -> dict[str, dict[str, list[int]]]:
    """The shapes of all outputs by mode; in train mode from batch 2 on, which batch norms need. Buffers are kept."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = {}
    with torch.no_grad():
        for mode in ("eval", "train") if batch > 1 else ("eval",):
            outputs = flatten(model.train(mode == "train")(x))
            found[mode] = {name: list(value.shape) for name, value in outputs.items() if hasattr(value, "shape")}
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    model.eval()
    return found


def _gradients(model: nn.Module, x: torch.Tensor) -> set[str]:
    """The names of the parameters that a backward reaches; none of their gradients is a NaN."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = [v for v in flatten(model(x)).values() if isinstance(v, torch.Tensor) and v.requires_grad]
    sum(value.float().square().mean() for value in outputs).backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    return found


def _state(model: nn.Module) -> list[Any]:
    """What must not change: every tensor (by its sum), every mode, the random state and grad mode."""
    tensors = [(n, list(t.shape), float(t.detach().double().sum())) for n, t in model.state_dict().items()]
    modes = [(name, module.training) for name, module in model.named_modules()]
    asks = [(name, each.requires_grad, each.grad is None) for name, each in model.named_parameters()]
    return [tensors, modes, asks, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def _counts(module: nn.Module) -> list[tuple[str, int, int]]:
    """What a layer of torch says of its width, and what its weight says."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and weight is not None:
        return [
            ("out_features", module.out_features, len(weight)),
            ("in_features", module.in_features, weight.shape[1]),
        ]
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        wide, deep = weight.shape[:2]
        if module.transposed:
            return [
                ("in_channels", module.in_channels, wide),
                ("out_channels", module.out_channels, deep * module.groups),
            ]
        return [("out_channels", module.out_channels, wide), ("in_channels", module.in_channels, deep * module.groups)]
    if isinstance(module, nn.modules.batchnorm._NormBase) and weight is not None:
        return [("num_features", module.num_features, len(weight))]
    if isinstance(module, nn.LayerNorm) and weight is not None:
        return [("normalized_shape", module.normalized_shape[-1], weight.shape[-1])]
    if isinstance(module, nn.GroupNorm) and weight is not None:
        return [("num_channels", module.num_channels, len(weight))]
    return []


def _features(model: Any, net: Any, x: torch.Tensor) -> list[tuple[dict[str, Any], int, int]]:
    """For each feature that timm tells of: what is said of its width, and what it is."""
    infos = [list(getattr(each, "feature_info", None) or []) for each in (model, net)]
    if not all(isinstance(info, dict) and "module" in info for several in infos for info in several):
        return []
    widths = []
    for each, several in zip((model, net), infos, strict=True):
        outputs: dict[str, Any] = {}
        modules = dict(each.named_modules())
        handles = [
            modules[info["module"]].register_forward_hook(
                lambda _m, _a, output, path=info["module"], kept=outputs: kept.setdefault(path, output)
            )
            for info in several
            if info["module"] in modules
        ]
        with torch.no_grad():
            each.eval()(x)
        for handle in handles:
            handle.remove()
        widths.append({path: list(value.shape) for path, value in outputs.items() if isinstance(value, torch.Tensor)})
    found = []
    for before, after in zip(*infos, strict=True):
        shape, now = (each.get(before["module"], []) for each in widths)
        axes = [axis for axis, size in enumerate(shape) if axis and size == before["num_chs"]]
        if len(axes) == 1:
            found.append((after, after["num_chs"], now[axes[0]]))
    return found


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
