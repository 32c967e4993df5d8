"""What `quantize="auto"` tried, and why each lost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torchtrim.bench.table import Table
from torchtrim.export.judge import Agreement


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Attributes:
        name: What it is.
        scheme: Its scheme.
        size_mb: What the file weighs, in MB (10^6 bytes); None where it could not be made.
        ratio: Its latency over the float file's; None where it was not timed.
        ratio_low: Lower end of the ratio's interval.
        ratio_high: Upper end of it.
        agreement: How far it is from the float file; None where that was not asked.
        seconds: What making, timing and comparing it took.
        why: Why it lost, or `kept`.
    """

    name: str
    scheme: str
    size_mb: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    agreement: Agreement | None
    seconds: float
    why: str

    @property
    def kept(self) -> bool:
        """Whether this is the one."""
        return self.why.startswith("kept")


@dataclass(frozen=True)
class Selection:
    """What `quantize="auto"` tried.

    Attributes:
        tried: The candidates, the float file first.
        rows: How many rows they were compared on.
        max_drop: How much accuracy could be lost.
        seconds: How long it took.
        notes: What else there is to know.
    """

    tried: tuple[Tried, ...]
    rows: int
    max_drop: float
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> Tried:
        """The candidate that was kept."""
        return next(tried for tried in self.tried if tried.kept)

    def instead(self, failed: str, kept: str, why: str) -> Selection:
        """The same with another candidate kept, since one failed in the end.

        Args:
            failed: The name of the one that failed.
            kept: The name of the one that is kept now.
            why: What it failed by.
        """
        told = {failed: f"failed beside the model: {why}", kept: "kept"}
        tried = tuple(replace(one, why=told.get(one.name, one.why)) for one in self.tried)
        return replace(self, tried=tried)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "kept": self.kept.name, "notes": list(self.notes)}

    def table(self) -> Table:
        """The candidates as a table."""
        rows = []
        for tried in self.tried:
            interval = "-" if tried.ratio_low is None else f"{tried.ratio_low:.2f} - {tried.ratio_high:.2f}"
            rows.append(
                (
                    tried.name,
                    "-" if tried.size_mb is None else f"{tried.size_mb:.2f}",
                    "-" if tried.ratio is None else f"{tried.ratio:.2f}",
                    interval,
                    "-" if tried.agreement is None else f"{tried.agreement.cosine:.4f}",
                    _percent(None if tried.agreement is None else tried.agreement.top1),
                    _percent(None if tried.agreement is None else tried.agreement.accuracy),
                    f"{tried.seconds:.1f}",
                    tried.why,
                )
            )
        columns = ("candidate", "MB", "latency", "interval", "cosine", "top-1", "accuracy", "s", "why")
        notes = [f"latency: of that of the float file; compared on {self.rows} rows; {self.seconds:.0f} s", *self.notes]
        return Table("what was tried", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
