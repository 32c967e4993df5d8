"""EfficientNet-Lite0: every metric's order of its nine residual blocks beside the true order of removal. No training.

    python benchmarks/rank_lite0.py imagenet-sample.npz           # all metrics: some ten minutes on one core
    python benchmarks/rank_lite0.py imagenet-sample.npz --metrics influence fisher
    python benchmarks/rank_lite0.py imagenet-sample.npz --quick   # few pictures, few metrics

Half of the pictures are ranked on, the other half is for the figure: each block is taken out by itself with `tt.remove`
and the loss (cross-entropy) and top-1 of that model are the truth. Then the three blocks that matter least by a metric
are taken out together. The file holds `jpeg`, `offsets` and `labels`. What an earlier run has measured stays in the
results, so that a run may do a part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from heal_lite0 import EXAMPLE, read, run
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.demo.lite0 import efficientnet_lite0

# Name in the table: the metric, and how blocks that are bypassed are judged.
METRICS: dict[str, tuple[str, str | None]] = {
    "influence": ("influence", None),
    "angular": ("angular", None),
    "norm": ("norm", None),
    "sampled": ("sampled", None),
    "fisher": ("fisher", None),
    "taylor": ("taylor", None),
    "gradient": ("gradient", None),
    "attribution": ("attribution", None),
    "attribution:lrp": ("attribution:lrp", None),
    "ablation, output": ("ablation", "output"),
    "ablation, kl": ("ablation", "kl"),
    "ablation, loss": ("ablation", "loss"),
}
QUICK = ("influence", "sampled")
OTHERS = 5  # choices of rows for the metric that takes some of them
FEW = 25  # attribution takes so many steps a block that it sees one picture in so many


def main() -> int:
    made = parser(__doc__)
    made.add_argument("pictures", type=Path, help="the .npz file")
    made.add_argument("--metrics", nargs="+", choices=METRICS, help="only these")
    made.add_argument("--take", type=int, default=3, help="how many blocks to take out together")
    options = made.parse_args()
    torch.set_num_threads(1)
    pictures, labels = read(options.pictures)
    if options.quick:
        pictures, labels = pictures[:40], labels[:40]
    chosen = options.metrics or (QUICK if options.quick else list(METRICS))
    figure, ranking = (pictures[0::2], labels[0::2]), (pictures[1::2], labels[1::2])
    data = list(zip(ranking[0].split(25), ranking[1].split(25), strict=True))
    model = efficientnet_lite0()
    stem = "rank_lite0_quick" if options.quick else "rank_lite0"
    earlier = options.out / f"{stem}.json"
    held = json.loads(earlier.read_text("utf-8")) if earlier.exists() else {}
    truth = Truth(model, *figure, held.get("truth"))
    results: dict[str, dict[str, Any]] = held.get("metrics", {})
    for name in chosen:
        metric, measure = METRICS[name]
        few = [tuple(part[::FEW] for part in batch) for batch in data] if metric.startswith("attribution") else data
        try:
            found = tt.rank_blocks(model, few, metric, EXAMPLE, measure=measure)
        except tt.EditError as error:  # what captum has no rule for
            results[name] = {"refused": str(error)}
            continue
        out = found.least(options.take)
        results[name] = {
            "scores": {each.path: each.score for each in found.blocks},
            "order": list(found.order),
            "rows": found.rows,
            "forwards": found.forwards * found.rows / len(ranking[0]),
            "backwards": found.backwards * found.rows / len(ranking[0]),
            "seconds": round(found.seconds, 1),
            "spearman_loss": found.spearman(truth.losses),
            "spearman_top1": found.spearman(truth.drops),
            "out": out,
            "top1": truth.without(out)[1],
        }
        if metric == "sampled":  # which looks at a tenth of the rows: at others, too
            moved = [ranking[0].roll(shift, 0).split(25) for shift in range(1, 1 + OTHERS)]
            others = [tt.rank_blocks(model, list(each), metric, EXAMPLE) for each in moved]
            results[name]["others"] = [each.spearman(truth.losses) for each in others]
        print(name, results[name], flush=True)
    report(truth, results, options, stem, (len(ranking[1]), len(figure[1])))
    return 0


class Truth:
    """What is left of the model on the pictures of the figure, by what is taken out."""

    def __init__(
        self, model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, earlier: dict[str, Any] | None = None
    ) -> None:
        self.model, self.pictures, self.labels = model, pictures, labels
        self.known: dict[tuple[str, ...], tuple[float, float]] = {}
        for key, found in (earlier or {}).get("known", {}).items():
            self.known[tuple(key.split())] = (found[0], found[1])
        blocks = [block.path for block in tt.rank_blocks(model, [pictures[:2]], example_inputs=EXAMPLE).blocks]
        self.whole = self.without([])
        self.losses = {path: self.without([path])[0] for path in blocks}
        self.drops = {path: self.whole[1] - self.without([path])[1] for path in blocks}
        print({path: (round(self.losses[path], 4), round(self.drops[path], 1)) for path in blocks}, flush=True)

    def without(self, paths: list[str]) -> tuple[float, float]:
        """The loss, and top-1 in percent."""
        key = tuple(sorted(paths))
        if key not in self.known:
            net = tt.remove(self.model, EXAMPLE, paths, check=False) if paths else self.model
            logits = run(net, self.pictures)
            right = (logits.argmax(1) == self.labels).float().mean()
            self.known[key] = float(nn.functional.cross_entropy(logits, self.labels)), 100 * float(right)
        return self.known[key]


def report(
    truth: Truth, results: dict[str, dict[str, Any]], options: Any, stem: str, pictures: tuple[int, int]
) -> None:
    ranking, figure = pictures
    order = sorted(truth.losses, key=lambda path: truth.losses[path])
    rows: list[tuple[str, ...]] = [
        (
            "the truth",
            " ".join(_short(path) for path in order),
            "1",
            "",
            "",
            "",
            "",
            f"{truth.without(order[: options.take])[1]:.1f}",
        )
    ]
    for name in (each for each in METRICS if each in results):
        found = results[name]
        if "refused" in found:
            rows.append((name, "refused", *[""] * 6))
            continue
        rows.append(
            (
                name,
                " ".join(_short(path) for path in found["order"]),
                f"{found['spearman_loss']:.2f}",
                f"{found['spearman_top1']:.2f}",
                f"{found['forwards']:.2f}".removesuffix(".00"),
                f"{found['backwards']:.2f}".removesuffix(".00"),
                f"{found['seconds']:.0f}",
                f"{found['top1']:.1f}",
            )
        )
    again = [found["others"] for found in results.values() if "others" in found]
    single = ", ".join(f"{_short(path)}: {truth.losses[path]:.3f} ({truth.drops[path]:.1f})" for path in order)
    notes = [
        f"- blocks of `blocks`, the least important first; ranked on {ranking} pictures, judged on {figure} others "
        f"({100 / figure:.1f} points are one picture); whole: loss {truth.whole[0]:.3f}, top-1 {truth.whole[1]:.1f}",
        f"- without a block by itself, loss (points of top-1 lost): {single}",
        "- Spearman with the order by loss, and by top-1 lost; forward and backward passes over the ranking pictures",
        f"- top-1: in percent, after taking out the first {options.take} of the order together",
        "- ablation by loss is the truth's own measure, on the ranking pictures: its Spearman says how far figures on "
        "so few can be trusted",
        *(f"- sampled, with other rows: {', '.join(f'{one:.2f}' for one in others)}" for others in again),
        f"- attribution on every {FEW}th of them",
        *(f"- {name}: {found['refused']}" for name, found in results.items() if "refused" in found),
    ]
    columns = ("metric", "order", "Spearman loss", "Spearman top-1", "forward", "backward", "s", "top-1")
    table = Table("EfficientNet-Lite0: which blocks can go?", columns, tuple(rows), notes, left=2)
    known = {" ".join(key): found for key, found in truth.known.items()}
    data = {
        "truth": {"whole": truth.whole, "losses": truth.losses, "top1_lost": truth.drops, "known": known},
        "metrics": results,
    }
    write(stem, data, table, out=options.out)


def _short(path: str) -> str:
    return path.removeprefix("blocks.")


if __name__ == "__main__":
    raise SystemExit(main())
