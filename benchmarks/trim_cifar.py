"""EfficientNet-Lite0 that has learnt CIFAR-10 from 5,000 pictures, to half its MACs by `tt.trim`, in twenty minutes.

    python benchmarks/transfer_lite0.py DATA --ways gradual --only transfer --work WORK    # makes the model
    python benchmarks/trim_cifar.py DATA WORK/gradual.trim --folder trimmed                # 20 minutes on 2 cores
    python benchmarks/trim_cifar.py DATA WORK/gradual.trim --folder trimmed --quick

The search and the training see the 5,000 training pictures alone; the 10,000 test pictures are looked at in the end.
The untrimmed model is trained on for as many epochs, too, so that more training is not taken for better trimming. The
folder gets the report.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transfer_lite0 import BEST, EXAMPLE, Pictures, chosen, scored
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table


def main() -> int:
    made = parser(__doc__)
    made.add_argument("data", type=Path, help="the folder with CIFAR-10")
    made.add_argument("model", type=Path, help="the fine-tuned model, a .trim file")
    made.add_argument("--folder", type=Path, required=True, help="for the study and the report")
    made.add_argument("--epochs", type=int, default=6)
    made.add_argument("--trials", type=int, default=5)
    made.add_argument("--no-control", action="store_true", help="without training the untrimmed model on")
    options = made.parse_args()
    torch.set_num_threads(2)
    epochs, trials = (1, 2) if options.quick else (options.epochs, options.trials)
    train, test = chosen(options.data, quick=options.quick)
    whole = tt.load(options.model).eval()
    plain = Pictures(train._pictures, train._labels, training=False)
    seen = [batch for number, batch in enumerate(plain) if number % 10 == 0]  # of every class: they lie in order
    held = [batch for number, batch in enumerate(plain) if number % 10 == 5]

    def accuracy(net: nn.Module) -> float:
        return sum(int((net(x).argmax(1) == y).sum()) for x, y in held) / sum(len(y) for _, y in held)

    training: dict[str, Any] = {
        "epochs": epochs, "layer_decay": 0.9, "distill": {"temperature": 2.0, "alpha": 0.7}, **BEST
    }  # fmt: skip
    started = time.perf_counter()
    result = tt.trim(
        whole, seen, accuracy, EXAMPLE[:1], budget=tt.Budget(macs=0.5), trials=trials,
        pruning=["magnitude", "taylor", "reconstruction"], train_data=train, training=training, folder=options.folder,
    )  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    print(result, flush=True)
    rows = {"untrimmed": scored(whole, test), "trimmed": scored(result.model, test) | {"minutes": round(minutes, 1)}}
    rows["trimmed"]["plan"] = str(result.plan)
    if not options.no_control:
        started = time.perf_counter()
        tt.finetune(whole, train, **{name: value for name, value in training.items() if name != "distill"})
        minutes = (time.perf_counter() - started) / 60
        rows["untrimmed, trained on"] = scored(whole, test) | {"minutes": round(minutes, 1)}
    table = tuple(
        (name, f"{row['accuracy']:.2f}%", f"{row['macs'] / 1e6:.1f}", f"{row['params'] / 1e6:.2f}",
         str(row.get("minutes", "")), row.get("plan", ""))
        for name, row in rows.items()
    )  # fmt: skip
    notes = [f"- {train.rows:,} training pictures, {test.rows:,} test pictures; {epochs} epochs, {trials} plans"]
    columns = ("model", "top-1", "MACs (M)", "params (M)", "minutes", "plan")
    write(
        "trim_cifar_quick" if options.quick else "trim_cifar",
        {"results": rows, "report": str(options.folder.name)},
        Table("EfficientNet-Lite0 on CIFAR-10 to half its MACs", columns, table, notes),
        out=options.out,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
