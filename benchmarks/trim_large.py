"""EfficientNet-B7 ranked, planned and trimmed to half its MACs: time and peak memory, beside passes over the data.

    python benchmarks/trim_large.py                 # 32 pictures of 600 x 600 on 2 threads
    python benchmarks/trim_large.py --quick         # efficientnet_b0, 224 x 224

Random weights and random pictures. The unit is one forward pass over the data. Peak memory is that of the process
after each part, so each row holds those before it, too.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import timm
import torch
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--pictures", type=int, default=32)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    name, size = ("efficientnet_b0", 224) if options.quick else ("efficientnet_b7", 600)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    data = [torch.randn(4, 3, size, size) for _ in range(options.pictures // 4)]
    example = data[0][:1]
    parts: dict[str, Any] = {}

    def timed(part: str, call: Any) -> Any:
        started = time.perf_counter()
        found = call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        parts[part] = {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(peak, 2)}
        print(part, parts[part], flush=True)
        return found

    def forward() -> None:
        with torch.no_grad():
            for batch in data:
                model(batch)

    timed("one forward pass over the data", forward)
    ranking = timed("rank_blocks, influence", lambda: tt.rank_blocks(model, data, "influence", example))
    edit = tt.PruneChannels(budget=tt.Budget(macs=0.5))
    timed("plan of a pruning", lambda: tt.plan(model, example, edit))
    result = timed(
        "trim",
        lambda: tt.trim(
            model, data, None, example, budget=tt.Budget(macs=0.5), ranking=ranking, pruning=["magnitude"],
            heal=False, trials=1,
        ),
    )  # fmt: skip
    unit = parts["one forward pass over the data"]["seconds"]
    machinery = sum(each["seconds"] for part, each in parts.items()) - unit
    rows = tuple(
        (part, f"{each['seconds']:.1f}", f"{each['seconds'] / unit:.2f}", f"{each['peak_gb']:.1f}")
        for part, each in parts.items()
    )
    notes = [
        f"- {name}, {options.pictures} pictures of {size} x {size}, {options.threads} threads, random weights",
        f"- trimmed to {result.met or result.missed}; plan: {result.plan}",
        f"- all of it: {machinery:.0f} s; three passes and 60 s: {3 * unit + 60:.0f} s",
    ]
    write(
        "trim_large_quick" if options.quick else "trim_large",
        {"parts": parts, "machinery": machinery, "target": 3 * unit + 60, "plan": str(result.plan)},
        Table("a large network trimmed", ("part", "seconds", "passes", "peak GB"), rows, notes),
        out=options.out,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
