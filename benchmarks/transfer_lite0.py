"""EfficientNet-Lite0 learns CIFAR-10 from 5,000 pictures: `tt.finetune` beside the usual loop; then it is trimmed.

    python benchmarks/transfer_lite0.py DATA                      # 10 minutes a way, on 2 cores: 2 hours
    python benchmarks/transfer_lite0.py DATA --ways plain gradual
    python benchmarks/transfer_lite0.py DATA --only recovery      # with the model that the first part left in --work
    python benchmarks/transfer_lite0.py DATA --quick

Real weights (ImageNet), pictures enlarged to 96 x 96, the first 500 training pictures of each class, all 10,000 test
pictures at the end and never before. Each way has the same budget of processor time: the number of epochs is what fits
into it, after a few steps were timed. The plain loop: everything frozen but a new last layer, Adam at 1e-3.

Recovery: a third of the MACs of one of these (`--base`) is taken out (blocks, then channels), and what is left has the
same budget, with and without the untrimmed one as its teacher. DATA is what `mnist_data.py DATA cifar10` makes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from prune_cifar_data import Pictures as Cifar10
from torch import nn
from torch.nn.functional import interpolate, pad
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.demo.lite0 import efficientnet_lite0

SIZE, BATCH, EACH = 96, 50, 500
EXAMPLE = torch.zeros(2, 3, SIZE, SIZE)
BLOCKS = ("blocks.2.1", "blocks.5.2")


class Pictures:
    """Batches of enlarged pictures; in training shifted and turned round at random, in a random order."""

    def __init__(self, pictures: torch.Tensor, labels: torch.Tensor, *, training: bool) -> None:
        self._pictures, self._labels, self._training = pictures, labels, training
        self.rows = len(labels)

    def __len__(self) -> int:
        return -(-len(self._labels) // BATCH)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self._labels)) if self._training else torch.arange(len(self._labels))
        for rows in order.split(BATCH):
            x = self._pictures[rows].float() / 127.5 - 1
            yield interpolate(self._moved(x) if self._training else x, SIZE, mode="bicubic"), self._labels[rows]

    @staticmethod
    def _moved(x: torch.Tensor) -> torch.Tensor:
        wide = pad(x, (4, 4, 4, 4), mode="reflect")
        cut = [
            wide[row, :, top : top + 32, left : left + 32]
            for row, (top, left) in enumerate(torch.randint(0, 9, (len(x), 2)).tolist())
        ]
        moved = torch.stack(cut)
        turned = torch.rand(len(x)) < 0.5
        moved[turned] = moved[turned].flip(3)
        return moved


def main() -> int:
    made = parser(__doc__)
    made.add_argument("data", type=Path, help="the folder with CIFAR-10")
    made.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    made.add_argument("--only", choices=("transfer", "recovery"), help="one of the two parts")
    made.add_argument("--base", choices=list(WAYS), default="gradual", help="whose model is trimmed (gradual)")
    made.add_argument("--minutes", type=float, default=10.0, help="processor time of each, over the threads (10)")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument(
        "--work", type=Path, default=Path("transfer-work"), help="where models are kept between the parts"
    )
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    train, test = chosen(options.data, quick=options.quick)
    options.work.mkdir(parents=True, exist_ok=True)
    budget = Budget(0.05 if options.quick else options.minutes, options.threads)
    stem = "transfer_lite0_quick" if options.quick else "transfer_lite0"
    rows = Rows(stem, options.out, train.rows)
    if options.only != "recovery":
        for name in options.ways:
            torch.manual_seed(0)
            net = WAYS[name](train, budget)
            spent = budget.spent()
            rows.add(name, scored(net, test) | spent)
            tt.save(net, options.work / f"{name}.trim")
    if options.only != "transfer":
        heal = "scale" if options.quick else "auto"  # the best way trains for minutes
        recover(options.base, heal, options.work, train, test, budget, rows)
    return 0


class Budget:
    """Processor time, so that a busy machine takes longer and does as much."""

    def __init__(self, minutes: float, threads: int) -> None:
        self._seconds, self._threads = 60 * minutes, threads
        self._start = time.process_time()
        self._epochs = 0

    def epochs(self, step: Callable[[], object], steps: int) -> int:
        """How many epochs of so many steps fit, at least two; begins to count."""
        step()
        before = time.process_time()
        for _ in range(3):
            step()
        each = (time.process_time() - before) / 3 / self._threads
        self._epochs = max(round(self._seconds / (each * steps)), 2)
        self._start = time.process_time()
        return self._epochs

    def spent(self) -> dict[str, float]:
        minutes = (time.process_time() - self._start) / self._threads / 60
        return {"epochs": self._epochs, "minutes": round(minutes, 1)}


def chosen(root: Path, *, quick: bool) -> tuple[Pictures, Pictures]:
    each, tests = (20, 200) if quick else (EACH, 10_000)
    pictures, labels = read(root, train=True)
    rows = torch.cat([(labels == label).nonzero()[:each, 0] for label in range(10)])
    test, answers = read(root, train=False)
    return Pictures(pictures[rows], labels[rows], training=True), Pictures(
        test[:tests], answers[:tests], training=False
    )


def read(root: Path, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    found = Cifar10(root, train=train)
    return torch.from_numpy(found.data).permute(0, 3, 1, 2), torch.tensor(found.targets)


def fresh() -> nn.Module:
    return tt.attach_head(efficientnet_lite0(), EXAMPLE, num_classes=10)


def one_step(net: nn.Module, teacher: nn.Module | None = None, *, all_learn: bool = True) -> Callable[[], object]:
    """What a step costs: forward and backward of a batch, on a copy of its own."""
    twin = tt.apply(net, EXAMPLE, [])
    tt.freeze(twin) if not all_learn else tt.unfreeze(twin)
    tt.unfreeze(twin, "classifier")
    x, y = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 10, (BATCH,))
    rule = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        if teacher is not None:
            with torch.no_grad():
                teacher(x)
        nn.functional.cross_entropy(twin(x), y).backward()
        rule.step()
        rule.zero_grad()

    return step


def plain(train: Pictures, budget: Budget) -> nn.Module:
    """What tutorials do."""
    net = efficientnet_lite0()
    for parameter in net.parameters():
        parameter.requires_grad = False
    net.classifier = nn.Linear(net.classifier.in_features, 10)
    optimizer = torch.optim.Adam(net.classifier.parameters(), lr=1e-3)
    for _ in range(budget.epochs(one_step(fresh(), all_learn=False), len(train))):
        net.train()
        for pictures, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(pictures), labels).backward()
            optimizer.step()
    return net.eval()


def head(train: Pictures, budget: Budget) -> nn.Module:
    net = fresh()
    epochs = budget.epochs(one_step(net, all_learn=False), len(train))
    print(tt.finetune(net, train, epochs=epochs, unfreeze="head", lr=3e-3, warmup=0.1))
    return net


def gradual(train: Pictures, budget: Budget) -> nn.Module:
    net = fresh()
    epochs = budget.epochs(one_step(net), len(train))
    print(tt.finetune(net, train, epochs=epochs, unfreeze="gradual", **BEST))
    return net


def discriminative(train: Pictures, budget: Budget) -> nn.Module:
    net = fresh()
    epochs = budget.epochs(one_step(net), len(train))
    print(tt.finetune(net, train, epochs=epochs, layer_decay=0.85, **BEST))
    return net


def both(train: Pictures, budget: Budget) -> nn.Module:
    net = fresh()
    epochs = budget.epochs(one_step(net), len(train))
    print(tt.finetune(net, train, epochs=epochs, unfreeze={0: "head", 1: "all"}, layer_decay=0.85, **BEST))
    return net


BEST: dict[str, Any] = {"lr": 2e-3, "warmup": 0.1, "label_smoothing": 0.1, "clip_norm": 1.0}
WAYS: dict[str, Callable[[Pictures, Budget], nn.Module]] = {
    "plain": plain, "head": head, "gradual": gradual, "discriminative": discriminative, "both": both,
}  # fmt: skip


def recover(base: str, heal: Any, work: Path, train: Pictures, test: Pictures, budget: Budget, rows: Rows) -> None:
    """Take out a third of the MACs, and train what is left with and without its teacher."""
    whole = tt.load(work / f"{base}.trim").eval()
    macs = tt.summary(whole, EXAMPLE).macs
    calibration = [batch for batch, _ in zip(train, range(10), strict=False)]
    start = time.process_time()
    shorter = tt.remove(whole, EXAMPLE, BLOCKS, heal=heal, data=[x for x, _ in calibration])
    small = tt.prune_channels(
        shorter, EXAMPLE, budget=tt.Budget(macs=round(macs * 2 / 3)), importance="taylor", data=calibration
    )
    minutes = round((time.process_time() - start) / torch.get_num_threads() / 60, 1)  # beside the budget of both
    rows.add(f"{base}, trimmed", scored(small, test) | {"epochs": 0, "minutes": minutes})
    for name, teacher in ((f"{base}, trimmed, trained", None), (f"{base}, trimmed, distilled", whole)):
        net = tt.apply(small, EXAMPLE, [])
        epochs = budget.epochs(one_step(net, teacher), len(train))
        options = {} if teacher is None else {"distill": {"temperature": 2.0, "alpha": 0.7}}
        print(tt.finetune(net, train, epochs=epochs, layer_decay=0.9, teacher=teacher, **BEST, **options))
        spent = budget.spent()
        rows.add(name, scored(net, test) | spent)


@torch.no_grad()
def scored(net: nn.Module, test: Pictures) -> dict[str, Any]:
    net.eval()
    right = sum(int((net(pictures).argmax(1) == labels).sum()) for pictures, labels in test)
    total = sum(len(labels) for _, labels in test)
    found = tt.summary(net, EXAMPLE)
    return {"accuracy": round(100 * right / total, 2), "macs": found.macs, "params": found.params, "pictures": total}


class Rows:
    """The results, written after each; those of earlier runs stay."""

    def __init__(self, stem: str, out: Path, training: int) -> None:
        self._stem, self._out, self._training = stem, out, training
        place = out / f"{stem}.json"
        self.found: dict[str, Any] = json.loads(place.read_text("utf-8"))["results"] if place.is_file() else {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.found[name] = row
        rows = tuple(
            (key, f"{each['accuracy']:.2f}%", f"{each['macs'] / 1e6:.1f}", f"{each['params'] / 1e6:.2f}",
             str(each["epochs"]), f"{each['minutes']:.1f}")
            for key, each in self.found.items()
        )  # fmt: skip
        columns = ("way", "top-1", "MACs (M)", "params (M)", "epochs", "minutes")
        notes = [f"- {self._training:,} training pictures, {row['pictures']:,} test pictures, {SIZE} x {SIZE}"]
        write(
            self._stem,
            {"results": self.found},
            Table("EfficientNet-Lite0 on CIFAR-10", columns, rows, notes),
            out=self._out,
        )


if __name__ == "__main__":
    raise SystemExit(main())
