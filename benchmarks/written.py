"""What a benchmark leaves behind: JSON for machines and a Markdown table for people, both with machine and versions."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtrim.bench.machine import machine
from torchtrim.bench.table import Table

RESULTS = Path(__file__).parent / "results"


def write(stem: str, data: dict[str, Any], *tables: Table, out: Path = RESULTS, show: bool = True) -> None:
    """Write `stem.json` and `stem.md`; the machine goes into both."""
    *first, last = tables
    signed = replace(last, notes=[*last.notes, *(f"- {line}" for line in str(machine()).splitlines())])
    text = "\n\n".join(table.markdown() for table in (*first, signed))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps({"machine": machine().to_dict(), **data}, indent=1) + "\n", "utf-8")
    (out / f"{stem}.md").write_text(text + "\n", "utf-8")
    if show:
        print(text)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a small size, under a minute")
    made.add_argument("--out", type=Path, default=RESULTS, help="the folder for the results (benchmarks/results)")
    return made
