"""The float file of an export turned into the scheme that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError
from torchtrim.export.auto import choose
from torchtrim.export.calibration_data import CalibrationData, Feed
from torchtrim.export.judge import COSINE, Judge
from torchtrim.export.mixed import mix
from torchtrim.export.rows import with_other_rows
from torchtrim.export.selection import Selection
from torchtrim.export.workbench import Built, Workbench
from torchtrim.graph.inputs import Inputs

_MADE_UP = 16  # rows to compare on, where there is no data


@dataclass(frozen=True)
class Converted:
    """A file in the scheme asked for.

    Attributes:
        built: The file.
        notes: What there is to know of it.
        selection: What `auto` tried; None elsewhere.
        others: What else `auto` would keep, the fastest first.
    """

    built: Built
    notes: tuple[str, ...] = ()
    selection: Selection | None = None
    others: tuple[Built, ...] = ()


def convert(
    bench: Workbench,
    scheme: str,
    precision: str,
    *,
    inputs: Inputs,
    max_drop: float,
    cosine: float | None,
    provider: str,
    timed: bool,
    threads: int | None,
    say: Callable[[str], object],
) -> Converted:
    """Turn the float file into a scheme.

    Args:
        bench: The float file.
        scheme: What is asked for.
        precision: What the float file computes in.
        inputs: The example.
        max_drop: How much accuracy `mixed` and `auto` may lose.
        cosine: The least cosine of the outputs to the float file's, where the user named one.
        provider: What runs the files here.
        timed: Whether that is what the target runs them on.
        threads: Threads to time with.
        say: Called with what is being done.

    Raises:
        ExportError: The scheme starts from float32 and the file is not, or it cannot be made.
        InputError: It needs data, and there is none.
    """
    if scheme == precision:
        return Converted(Built("float", scheme, bench.plain, 0))
    if precision != "float32" and scheme != "dynamic":
        raise ExportError(
            f"{scheme} starts from float32", found=f"a model in {precision}", hint="model.float(), or quantize=None"
        )
    if scheme not in ("mixed", "auto"):
        say(f"converting to {scheme}")
        makers: dict[str, Callable[[], Built]] = {
            "dynamic": bench.dynamic,
            "static": lambda: bench.corrected(bench.static()),
            "weight_only": bench.weight_only,
            "fp16": bench.half,
            "bf16": bench.brain,
        }
        built = makers[scheme]()
        return Converted(built, tuple(_notes(built, bench, precision)))
    say("comparing on")
    feed, others = _feeds(bench, inputs)
    judge = Judge(
        bench.plain,
        others if bench.data is None else bench.data,
        max_drop=max_drop,
        cosine=COSINE if cosine is None else cosine,
        provider=provider,
        threads=threads,
        optimise=bench.target.name in ("cpu", "openvino") or timed,
    )
    if scheme == "mixed":
        say("mixing")
        mixture = mix(bench, judge, feed, threads=threads)
        missed = judge.against(mixture.agreement)
        told = () if missed is None else (f"mixed: the nearest mixture is not near enough: {missed}",)
        return Converted(mixture.built, (*mixture.notes, *judge.notes, *told))
    chosen = choose(bench, judge, feed, provider=provider, timed=timed, threads=threads, say=say)
    return Converted(chosen.built, (), chosen.selection, chosen.others)


@dataclass(frozen=True)
class Batches:
    """The data to compare on, as the forward's arguments again, with the classes where there are some.

    Read from disk each time that it is gone through.

    Attributes:
        data: The data as feeds.
        inputs: An example, for the form of the arguments.
        names: The names of the file's inputs, in the order of the example's tensors.
    """

    data: CalibrationData
    inputs: Inputs
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[Inputs, torch.Tensor | None]]:
        feeds = self.data.comparison()
        pairs = self.data.labelled_comparison() if self.data.labelled else ((feed, None) for feed in feeds)
        for feed, targets in pairs:
            arrays = [torch.from_numpy(feed[name]) for name in self.names]
            yield _refilled(self.inputs, arrays), None if targets is None else torch.from_numpy(targets)


def _refilled(inputs: Inputs, tensors: list[torch.Tensor]) -> Inputs:
    """The same arguments with other tensors, in order."""
    left = iter(tensors)
    return inputs.map(lambda tensor: next(left))


def _feeds(bench: Workbench, inputs: Inputs) -> tuple[Feed, list[Feed]]:
    """One row to time on, and made-up rows to compare on."""
    session = OnnxSession(bench.plain)
    if session.fixed_batch is not None:
        feed = session.feed(inputs.with_batch(session.fixed_batch), cast=True)
        return feed, [feed]
    rows = with_other_rows(inputs, max(_MADE_UP, inputs.batch))
    return session.feed(inputs.with_batch(1), cast=True), [session.feed(rows, cast=True)]


def _notes(built: Built, bench: Workbench, precision: str) -> list[str]:
    notes = list(built.notes)
    if built.scheme in ("dynamic", "static", "weight_only") and not built.nodes:
        what = " or ".join(bench.options.ops) if built.scheme == "dynamic" else "layer"
        notes.append(f"nothing was quantized: the model has no {what} with float32 weights; it is {precision}")
    if built.scheme == "dynamic" and "Conv" in bench.options.ops:
        notes.append("dynamic int8 convolutions are usually slower than float32 ones")
    here = bench.target.name in ("cpu", "openvino")
    if built.scheme in ("dynamic", "static") and built.nodes and here and bench.saturates:
        notes.append("this processor has no VNNI: reduce_range=True avoids overflow in its 8-bit sums")
    return notes
