"""The float file of an export, and the files that are made from it: what several of them need is done once."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from torchtrim.bench.int8_format import Int8Format, best_format
from torchtrim.bench.machine import machine
from torchtrim.errors import ExportError, InputError
from torchtrim.export.bfloat16 import to_bfloat16
from torchtrim.export.bias_correction import correct_biases, counted
from torchtrim.export.calibration import Statistics, calibrate
from torchtrim.export.calibration_data import CalibrationData, Feed
from torchtrim.export.cuda_int8 import quantize_for_cuda
from torchtrim.export.equalise import equalise_layers, smooth, smoothing_tensors
from torchtrim.export.graph import join_files
from torchtrim.export.prepare import prepare
from torchtrim.export.quantize import DYNAMIC_OPS, quantize_dynamic, to_float16
from torchtrim.export.static import calibration_tensors, quantize_static
from torchtrim.export.targets import Target
from torchtrim.export.trained import FoundRanges
from torchtrim.export.weight_only import quantize_weights


@dataclass(frozen=True)
class Options:
    """What a user may say of how a file is quantized.

    Attributes:
        ops: The operators that dynamic int8 quantizes.
        per_channel: One scale for each output channel.
        reduce_range: Weights in 7 bits, but for depthwise convolutions; None: where this machine needs it.
        method: How the ranges of activations are chosen: `minmax`, `entropy`, `percentile`, `mse`.
        bits: Of weight-only quantization: 8 or 4.
        block: How many weights share a scale there.
        half_io: Take and give float16 too.
    """

    ops: tuple[str, ...] = DYNAMIC_OPS
    per_channel: bool = True
    reduce_range: bool | None = None
    method: str = "minmax"
    bits: int = 8
    block: int = 128
    half_io: bool = False


@dataclass(frozen=True)
class Built:
    """A file that was made from the float file.

    Attributes:
        name: What it is, for people.
        scheme: Its scheme: `dynamic`, `static`, ...
        path: Where it lies, in the workbench's folder.
        nodes: How many nodes compute in int8, or hold int8 weights.
        notes: What there is to know of it.
    """

    name: str
    scheme: str
    path: Path
    nodes: int
    notes: tuple[str, ...] = ()


class Workbench:
    """Makes files of every scheme from one float file.

    Args:
        plain: The float file.
        folder: Where everything is made; the caller removes it.
        target: Where the files will run.
        data: What to calibrate on; None where there is none.
        options: What the user said.
        external: Whether weights lie beside the files (past 2 GB).
        threads: ONNX Runtime's threads while calibrating.

    Attributes:
        trained: The ranges that the model was trained with, where it was.
        asked_format: The 8-bit types that it was trained for.
    """

    def __init__(
        self,
        plain: Path,
        folder: Path,
        *,
        target: Target,
        data: CalibrationData | None = None,
        options: Options | None = None,
        external: bool = False,
        threads: int | None = None,
    ) -> None:
        self.plain, self.folder, self.target, self.data = plain, folder, target, data
        self.options = options or Options()
        self.external, self.threads = external, threads
        self.trained: FoundRanges | None = None
        self.asked_format: Int8Format | None = None
        self._made = 0

    @cached_property
    def prepared(self) -> Path:
        """The float file with constants and norms folded, each node with a name of its own."""
        path = self.place("prepared")
        prepare(self.plain, path, external_data=self.external)
        return path

    @cached_property
    def graph(self) -> onnx.GraphProto:
        """The prepared file's graph."""
        return onnx.load(self.prepared, load_external_data=False).graph

    @cached_property
    def statistics(self) -> Statistics:
        """The prepared file's calibration."""
        return self.calibrated(self.prepared)

    @property
    def int8(self) -> Int8Format:
        """The 8-bit types for where the files will run."""
        if self.target.name in ("cuda", "tensorrt"):
            return Int8Format("int8", "int8", False)
        if self.asked_format is not None:
            return self.asked_format
        found = best_format(machine())
        asked = self.options.reduce_range
        return found if asked is None else found._replace(reduce_range=asked)

    @property
    def saturates(self) -> bool:
        """Whether sums of these 8-bit types overflow on this processor."""
        return best_format(machine()).reduce_range and not self.int8.reduce_range

    def calibrated(self, prepared: Path) -> Statistics:
        """The calibration of a float file."""
        tensors = calibration_tensors(prepared, form=self._form)
        return calibrate(prepared, self._data.calibration(), tensors, threads=self.threads)

    def place(self, name: str) -> Path:
        """A new folder's path for a file of the float file's name."""
        self._made += 1
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        folder = Path(tempfile.mkdtemp(prefix=f"{self._made:02d}-{slug}-", dir=self.folder))
        return folder / self.plain.name

    def dynamic(self, nodes: Collection[str] | None = None, *, name: str = "dynamic") -> Built:
        """Int8 weights, activations quantized as it runs: all products, or the nodes named."""
        path = self.place(name)
        if self.target.name == "cuda":
            count = quantize_for_cuda(
                self.prepared, path, per_channel=self.options.per_channel, external_data=self.external
            )
        else:
            count = quantize_dynamic(
                self.prepared,
                path,
                nodes=nodes,
                ops=self.options.ops,
                per_channel=self.options.per_channel,
                reduce_range=self.int8.reduce_range,
                external_data=self.external,
            )
        return self._built(name, "dynamic", path, count)

    def static(
        self,
        nodes: Collection[str] | None = None,
        *,
        method: str | None = None,
        prepared: Path | None = None,
        statistics: Statistics | None = None,
        int8: Int8Format | None = None,
        name: str = "static",
    ) -> Built:
        """Int8 with scales fixed from calibration: all that has an int8 form, or the nodes named.

        Args:
            nodes: The names of the nodes; None: all.
            method: How ranges are chosen; the user's by default.
            prepared: Another float file than the prepared one (equalised), with its `statistics`.
            statistics: Those of `prepared`.
            int8: Other 8-bit types than those of this machine.
            name: What to call it.
        """
        path = self.place(name)
        found = int8 or self.int8
        statistics = statistics or self.statistics
        count = quantize_static(
            prepared or self.prepared,
            path,
            statistics if self.trained is None else self.trained.over(statistics),
            nodes=nodes,
            method=method or self.options.method,
            activations=found.activations,
            weights=found.weights,
            reduce_range=found.reduce_range,
            exact=found.exact,
            per_channel=self.options.per_channel,
            form=self._form,
            levels=None if self.trained is None else self.trained.levels,
            external_data=self.external,
        )
        return self._built(name, "static", path, count)

    def mixed(
        self,
        static: Collection[str],
        dynamic: Collection[str],
        *,
        name: str = "mixed",
        method: str | None = None,
        int8: Int8Format | None = None,
    ) -> Built:
        """Some nodes in static int8, others in dynamic int8, the rest in float.

        Args:
            static: The names of the static ones.
            dynamic: The names of the dynamic ones.
            name: What to call it.
            method: How ranges are chosen; the user's by default.
            int8: Other 8-bit types for the static ones than those of this machine.
        """
        if not dynamic:
            return self._renamed(self.static(static, name=name, method=method, int8=int8), "mixed")
        if not static:
            return self._renamed(self.dynamic(dynamic, name=name), "mixed")
        first = self.static(static, name=name, method=method, int8=int8)
        path = self.place(name)
        count = quantize_dynamic(
            first.path,
            path,
            nodes=dynamic,
            per_channel=self.options.per_channel,
            reduce_range=self.int8.reduce_range,
            external_data=self.external,
        )
        return self._built(name, "mixed", path, first.nodes + count)

    def weight_only(self, *, name: str = "weight_only") -> Built:
        """Int8 or int4 weights, float arithmetic."""
        path = self.place(name)
        form = "nbits" if self.target.name in ("cpu", "cuda") else "qdq"
        bits, block = self.options.bits, self.options.block
        count = quantize_weights(self.prepared, path, bits=bits, block=block, form=form, external_data=self.external)
        return self._built(name, "weight_only", path, count)

    def half(self, *, name: str = "fp16") -> Built:
        """Float16."""
        path = self.place(name)
        to_float16(self.plain, path, half_io=self.options.half_io, external_data=self.external, target=self.target.name)
        return self._built(name, "fp16", path, 0)

    def brain(self, *, name: str = "bf16") -> Built:
        """Bfloat16."""
        path = self.place(name)
        to_bfloat16(self.plain, path, target=self.target.name, external_data=self.external)
        return self._built(name, "bf16", path, 0)

    def smoothed(self) -> tuple[Path, int]:
        """The prepared file with the outliers after layer norms moved into the weights, and how many norms were."""
        path = self.place("smoothed")
        channels = smoothing_tensors(self.prepared)
        found = calibrate(
            self.prepared, self._data.calibration(), list(channels), channels=channels, threads=self.threads
        )
        return path, smooth(self.prepared, path, found)

    def equalised(self) -> tuple[Path, int]:
        """The prepared file with the ranges of neighbouring convolutions made equal, and how many pairs were."""
        path = self.place("equalised")
        return path, equalise_layers(self.prepared, path)

    def corrected(self, built: Built, prepared: Path | None = None) -> Built:
        """A file with static layers whose biases make up for the shift that rounding gives each channel.

        The file itself, where that does not bring its outputs nearer or cannot be done, where there is no data, and
        where the model was trained with its rounding.
        """
        if self.data is None or self.trained is not None or not built.nodes:
            return built
        path = self.place(f"{built.name}, biases corrected")
        try:
            found = correct_biases(
                prepared or self.prepared,
                built.path,
                path,
                self.data,
                threads=self.threads,
                optimise=self.target.name in ("cpu", "openvino") and not self.saturates,
            )
        except ExportError as error:
            return replace(built, notes=(*built.notes, f"{built.scheme}: biases are not corrected: {error.message}"))
        if found is None or not found.helped:
            return built
        note = f"{built.scheme}: {counted(found.corrected)} corrected for what rounding shifts"
        return replace(built, path=path, notes=(*built.notes, note))

    @property
    def _form(self) -> str:
        return "tensorrt" if self.target.name in ("cuda", "tensorrt") else "cpu"

    @property
    def _data(self) -> CalibrationData:
        if self.data is None:
            raise InputError(
                "scales are fixed from calibration, and there is no data",
                path="data",
                found=None,
                expected="batches of inputs, some hundred rows",
                hint='data=, or quantize="dynamic"',
            )
        return self.data

    def _built(self, name: str, scheme: str, path: Path, count: int) -> Built:
        join_files(path)
        return Built(name, scheme, path, count)

    @staticmethod
    def _renamed(built: Built, scheme: str) -> Built:
        return replace(built, scheme=scheme)


def first_row(feed: Feed) -> Feed:
    """One row of a feed: what latency is measured on."""
    rows = max((len(array) for array in feed.values() if array.ndim), default=1)
    return {name: array[:1] if array.ndim and len(array) == rows else array for name, array in feed.items()}
