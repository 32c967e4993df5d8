"""Training what is left: it learns, it repeats, it resumes, and it leaves everything else as it was."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import torchtrim as tt
from torchtrim.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointMismatch,
    HeadError,
    InputError,
    ModelError,
    PathError,
    SelectionError,
    TorchTrimError,
)
from torchtrim.train.finetune import finetune


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 4, 3)
    )


def batches(count: int = 4, rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures whose class is the row that is bright."""
    found = []
    for number in range(count):
        labels = torch.randint(3, (rows,), generator=torch.Generator().manual_seed(number))
        pictures = 0.1 * torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(number))
        for row, label in enumerate(labels.tolist()):
            pictures[row, :, label] += 2
        found.append((pictures, labels))
    return found


def loader(**options: Any) -> DataLoader[Any]:
    pictures, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(pictures, labels), batch_size=6, shuffle=True, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def twins(count: int) -> list[nn.Module]:
    first = net()
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns(optimizer: str) -> None:
    model = net()
    done = finetune(model, batches(), batches(2), epochs=20, lr=0.02, optimizer=optimizer, layer_decay=0.9)
    assert done.epochs[-1].val_metric == 1.0
    assert done.epochs[-1].loss < 0.5 * done.epochs[0].loss
    assert (done.rows, done.frozen, done.metric, done.processes) == (32, 0, "accuracy", 1)
    assert len(json.loads(json.dumps(done.to_dict()))["epochs"]) == 20
    assert "val accuracy" in str(done)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    models = twins(3)
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.randn(3)  # whatever was drawn before does not matter
        finetune(model, loader(), epochs=2, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_it_is_the_loop_that_people_write() -> None:
    torch.manual_seed(0)
    ours, by_hand = twins(2)
    ours[4].p = by_hand[4].p = 0.0
    done = finetune(
        ours, batches(), epochs=2, optimizer=torch.optim.SGD(ours.parameters(), lr=0.1), schedule="constant"
    )
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    by_hand.train()
    losses = []
    for _ in range(2):
        for pictures, labels in batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(by_hand(pictures), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert same(ours, by_hand)
    assert done.epochs[1].loss == pytest.approx(sum(losses[4:]) / 4)


def test_what_is_frozen_stays_and_is_free_afterwards() -> None:
    model = net().eval()
    model[5].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    done = finetune(model, batches(), epochs=1, unfreeze="head")
    assert torch.equal(random, torch.get_rng_state())
    assert same(model[0], before[0])
    assert same(model[1], before[1])  # its statistics too
    assert torch.equal(model[5].bias, before[5].bias)
    assert not torch.equal(model[5].weight, before[5].weight)
    assert done.trained == model[5].weight.numel()
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert model.train()[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_was_frozen_before_stays_frozen() -> None:
    model = net()
    tt.freeze(model, "1")
    finetune(model, batches(1), epochs=1)
    assert not model.train()[1].training
    assert not model[1].weight.requires_grad


def test_more_and_more_learns() -> None:
    model = net()
    head, conv = model[5].weight.numel() + 3, model[0].weight.numel() + 4
    done = finetune(model, batches(), epochs=4, unfreeze="gradual")
    assert [epoch.trained for epoch in done.epochs] == [head, head, head + 8, head + 8 + conv]
    done = finetune(model, batches(), epochs=3, unfreeze={0: "head", 2: ["0", nn.BatchNorm2d]})
    assert [epoch.trained for epoch in done.epochs] == [head, head, head + 8 + conv]


def test_targets_that_are_numbers_are_fitted_by_their_squares() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(16, 3)
    done = finetune(model, [(x, x @ torch.ones(3, 2))], epochs=60, lr=0.1, weight_decay=0.0)
    assert done.epochs[-1].loss < 0.01
    assert done.metric is None


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.a(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "other": self.b(x)}


def test_of_several_outputs_the_logits_are_trained_and_inputs_may_be_named() -> None:
    models = [Two()]
    models.append(copy.deepcopy(models[0]))
    b = models[0].b.weight.detach().clone()
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    one = finetune(models[0], [({"x": x}, labels)], epochs=2)
    other = finetune(models[1], [{"x": x, "labels": labels}], epochs=2)  # the model's own loss
    assert torch.equal(models[0].b.weight, b)
    assert same(*models)
    assert one.epochs[1].loss == other.epochs[1].loss


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_batches_of_one_step_are_one_large_batch(accumulate: int) -> None:
    """Also where their sizes differ, and where the last step has fewer."""
    models = [nn.Linear(4, 3)]
    models.append(copy.deepcopy(models[0]))
    x, y = torch.randn(21, 4), torch.randint(3, (21,))
    small = list(zip(x.split([4, 5, 2, 4, 6]), y.split([4, 5, 2, 4, 6]), strict=True))
    large = [
        tuple(torch.cat(part) for part in zip(*small[i : i + accumulate], strict=True)) for i in range(0, 5, accumulate)
    ]
    finetune(models[0], small, epochs=2, accumulate=accumulate, clip_norm=0.5)
    finetune(models[1], large, epochs=2, clip_norm=0.5)
    assert torch.allclose(models[0].weight, models[1].weight, atol=1e-6)


def test_gradients_are_clipped() -> None:
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    finetune(model, [(torch.randn(8, 4), torch.randint(3, (8,)))], epochs=1, optimizer=sgd, clip_norm=1e-3)
    assert 0 < (model.weight - before).norm() <= 1.001e-3


def test_rates_rise_and_fall_and_may_be_ones_own() -> None:
    seen: list[float] = []

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        rule = torch.optim.SGD(groups)
        rule.register_step_pre_hook(lambda rule, *_: seen.append(rule.param_groups[0]["lr"]))
        return rule

    finetune(net(), batches(), epochs=2, lr=1.0, optimizer=sgd, warmup=3)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert seen[4:] == sorted(seen[4:], reverse=True)
    assert seen[-1] < 0.15
    seen.clear()
    step = torch.optim.lr_scheduler.StepLR
    finetune(net(), batches(), epochs=2, lr=1.0, optimizer=sgd, schedule=lambda rule: step(rule, 1))
    assert seen == pytest.approx([1.0] * 4 + [0.1] * 4)
    seen.clear()
    cycle = torch.optim.lr_scheduler.OneCycleLR
    finetune(net(), batches(), epochs=1, lr=1.0, optimizer=sgd, schedule=lambda rule: cycle(rule, 1.0, total_steps=4))
    assert len(set(seen)) == 4


def test_the_best_epoch_is_kept_and_the_training_ends_without_better_ones() -> None:
    answers = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    snapshots: list[nn.Module] = []
    model = net()

    def metric(output: torch.Tensor, targets: torch.Tensor) -> float:
        return 0.0 if model.training else next(answers)

    done = finetune(
        model,
        batches(),
        batches(1),
        epochs=6,
        metric=metric,
        patience=3,
        on_epoch=lambda *_: snapshots.append(copy.deepcopy(model)),
    )
    assert (done.best, done.kept, len(done.epochs)) == (2, 2, 5)
    assert "no better for 3 epochs" in done.ended
    assert same(model, snapshots[1])
    assert not same(model, snapshots[4])
    model, answers = net(), iter([0.5, 0.4])
    assert finetune(model, batches(), batches(1), epochs=2, metric=metric, keep="last").kept == 2


def test_averaged_weights_are_kept() -> None:
    models = twins(2)
    finetune(models[0], batches(), epochs=3, lr=0.05, ema=0.5)
    finetune(models[1], batches(), epochs=3, lr=0.05)
    assert not same(*models)
    # The average lags behind the weights it is made of.
    assert (models[0][5].weight - models[1][5].weight).abs().max() < 0.2


def test_labels_are_smoothed_and_inputs_mixed() -> None:
    plain, smoothed = twins(2)
    one = finetune(plain, batches(), batches(), epochs=2)
    other = finetune(smoothed, batches(), batches(), epochs=2, label_smoothing=0.3)
    assert other.epochs[0].loss != one.epochs[0].loss
    assert not same(plain, smoothed)
    mixed = finetune(net(), batches(), batches(), epochs=8, lr=0.02, mixup=0.2)
    assert mixed.epochs[-1].metric is None  # the targets are no classes any more
    assert mixed.epochs[-1].val_metric > 0.8
    from timm.data import Mixup

    mixed = finetune(net(), batches(), epochs=1, mixup=Mixup(mixup_alpha=0.2, num_classes=3))
    assert mixed.epochs[0].loss > 0
    with pytest.raises(InputError, match="mixup refuses"):
        finetune(net(), batches(rows=7), epochs=1, mixup=Mixup(mixup_alpha=0.2, num_classes=3))


def test_mixed_precision() -> None:
    seen: list[torch.dtype] = []
    model = net()
    model[5].register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    done = finetune(model, batches(), batches(), epochs=8, lr=0.02, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert (done.precision, next(model.parameters()).dtype) == ("bf16", torch.float32)
    assert done.epochs[-1].val_metric > 0.9
    assert finetune(net(), batches(), epochs=1).precision == "float32"  # nothing of it stays


def test_sparse_training() -> None:
    x = batches()[0][0]
    sizes = []
    for strength in (0.0, 0.05):
        torch.manual_seed(0)
        model = net()
        finetune(model, batches(), epochs=3, lr=0.02, penalty=tt.SparsityPenalty(model, x, strength=strength))
        sizes.append(model[0].weight.norm().item())
    assert sizes[1] < sizes[0]


class Interrupting:
    """Accuracy, until it is called for the n-th time in a training."""

    def __init__(self, last: int | None = None) -> None:
        self.left = last
        self.__name__ = "accuracy"

    def __call__(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return (output.argmax(1) == targets).float().mean()


def seeded(**options: Any) -> DataLoader[Any]:
    return loader(generator=torch.Generator().manual_seed(5), **options)


@pytest.mark.parametrize("data", [batches, loader, seeded])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_training_goes_on_to_the_same_bits(tmp_path: Path, data: Any, ema: float | None) -> None:
    """Stopped in the middle of an epoch, with the head first, averaging, and a schedule by steps."""
    options: dict[str, Any] = {"epochs": 4, "unfreeze": {0: "head", 2: "all"}, "warmup": 0.2, "ema": ema}
    whole, broken, fresh = twins(3)
    once = finetune(whole, data(), batches(2), **options, metric=Interrupting(), folder=tmp_path / "whole")
    steps = len(data())
    stop = Interrupting(3 * steps + 2 * 2 + steps // 2)  # in the third or fourth epoch
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, data(), batches(2), **options, metric=stop, folder=tmp_path / "broken")
    last = tt.load(tmp_path / "broken" / "last.trim", model=net())
    assert same(broken, last)  # as after the last whole epoch
    assert not same(broken, fresh)
    again = finetune(
        fresh, data(), batches(2), **options, metric=Interrupting(), folder=tmp_path / "broken", resume=True
    )
    assert same(fresh, whole)
    assert [epoch.loss for epoch in again.epochs] == [epoch.loss for epoch in once.epochs]
    assert (again.best, again.kept, len(again.epochs)) == (once.best, once.kept, 4)
    assert same(tt.load(tmp_path / "broken" / "best.trim", model=net()), fresh)


def test_a_training_that_was_never_begun_is_begun_and_one_that_ended_is_ended(tmp_path: Path) -> None:
    first, second = twins(2)
    once = finetune(first, batches(), epochs=2, folder=tmp_path / "run", resume=True)
    again = finetune(second, batches(), epochs=2, folder=tmp_path / "run", resume=True)
    assert same(first, second)
    assert [epoch.loss for epoch in again.epochs] == [epoch.loss for epoch in once.epochs]


def test_a_folder_holds_one_training(tmp_path: Path) -> None:
    finetune(net(), batches(), epochs=1, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"already.*resume=True"):
        finetune(net(), batches(), epochs=1, folder=tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"lr.*0.001.*0.1"):
        finetune(net(), batches(), epochs=1, lr=0.1, folder=tmp_path, resume=True)
    wider = net()
    wider[5] = nn.Linear(16, 4)
    with pytest.raises(CheckpointMismatch, match=r"5.weight"):
        finetune(wider, batches(), epochs=1, folder=tmp_path, resume=True)
    data = (tmp_path / "state.pt").read_bytes()
    for wrong in (data[:-100], b"", data[:200] + bytes(100) + data[300:]):
        (tmp_path / "state.pt").write_bytes(wrong)
        with pytest.raises(CheckpointDamaged, match="state"):
            finetune(net(), batches(), epochs=1, folder=tmp_path, resume=True)
    with pytest.raises(InputError, match="folder="):
        finetune(net(), batches(), epochs=1, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        finetune(net(), batches(), epochs=1, folder=tmp_path / "file" / "below")


FULL_DISK = """
import resource, signal, sys
import torch
from torch import nn
from torchtrim.train.finetune import finetune
from torchtrim.errors import CheckpointError

torch.manual_seed(0)
net = nn.Linear(100, 3)
data = [(torch.randn(8, 100), torch.randint(3, (8,)))]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def fill(number, _epoch):
    if number == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

try:
    finetune(net, data, epochs=4, folder=sys.argv[1], on_epoch=fill)
except CheckpointError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print("refused:", error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_epoch_that_was_saved(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert "refused: " in run.stdout, run.stderr
    assert "cannot be written" in run.stdout
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last.trim", "state.pt"]
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert len(state["epochs"]) == 2
    torch.manual_seed(0)
    model, data = nn.Linear(100, 3), [(torch.randn(8, 100), torch.randint(3, (8,)))]
    assert len(finetune(model, data, epochs=4, folder=tmp_path / "run", resume=True).epochs) == 4


def test_a_loss_that_is_no_number_ends_it_at_the_last_good_epoch(tmp_path: Path) -> None:
    model = net()
    good: list[nn.Module] = []
    data = batches(3)

    def criterion(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        return nn.functional.cross_entropy(output, targets) * (torch.nan if len(steps) == 8 else 1)

    steps: list[int] = []
    with pytest.raises(ModelError, match=r"epoch 3, step 2.*clip_norm"):
        finetune(
            model,
            data,
            epochs=4,
            criterion=criterion,
            folder=tmp_path,
            on_epoch=lambda *_: good.append(copy.deepcopy(model)),
        )
    assert same(model, good[1])
    assert same(tt.load(tmp_path / "last.trim", model=net()), model)


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "training.md", "exec"), names)
    assert (tmp_path / "training.png").is_file()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"best.trim", "last.trim", "state.pt"}
    assert tt.history(names["net"]).edits[-1].kind == "sparsify"


def test_data_whose_length_is_not_known() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))

    done = finetune(net(), DataLoader(Stream(), batch_size=8), epochs=3)
    assert done.rows == 32
    assert done.epochs[2].lr < done.epochs[0].lr  # by epochs, where steps cannot be counted


def test_a_plot_and_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = finetune(net(), batches(), batches(), epochs=2, tensorboard=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(
        [epoch.val_loss for epoch in done.epochs]
    )
    assert done.plot(tmp_path / "training.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"epochs": 0}, InputError, "epochs"),
        ({"epochs": True}, InputError, "epochs"),
        ({"accumulate": 0}, InputError, "accumulate"),
        ({"patience": -1}, InputError, "patience"),
        ({"clip_norm": 0}, InputError, "clip_norm"),
        ({"keep": "first"}, InputError, "best or last"),
        ({"seed": -1}, InputError, "seed"),
        ({"optimizer": "adam"}, InputError, "adamw"),
        ({"optimizer": 3}, InputError, "a torch optimizer"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, TorchTrimError, "none of the model's"),
        ({"lr": -1.0}, TorchTrimError, "lr"),
        ({"schedule": "cosin"}, InputError, "cosine"),
        ({"schedule": "plateau", "warmup": 5}, InputError, "SequentialLR"),
        ({"schedule": lambda rule: 3}, InputError, "torch scheduler"),
        ({"warmup": 100}, InputError, "as long as the training"),
        ({"warmup": -1}, InputError, "warmup"),
        ({"unfreeze": {0: "9"}}, PathError, "9"),
        ({"unfreeze": {3: "5"}}, InputError, "0 to 1"),
        ({"unfreeze": {1: "5"}}, InputError, "nothing learns"),
        ({"unfreeze": "tail"}, InputError, "gradual"),
        ({"unfreeze": "gradual", "epochs": 1}, InputError, "2 or more"),
        ({"label_smoothing": 1.0}, InputError, "label_smoothing"),
        ({"mixup": -0.1}, InputError, "alpha"),
        ({"criterion": 3}, InputError, "criterion"),
        ({"criterion": lambda output, targets: output}, ModelError, "its mean"),
        ({"ema": 1.0}, InputError, "ema"),
        ({"precision": "fp8"}, InputError, "precision"),
        ({"accelerator": 3}, InputError, "accelerator"),
        ({"distill": {}}, InputError, "teacher="),
        ({"data": []}, InputError, "no batches"),
        ({"data": 3}, InputError, "iterable of batches"),
        ({"data": torch.zeros(4, 1, 4, 4)}, InputError, "iterable of batches"),
        ({"data": iter(batches(1))}, InputError, "gone through once"),
        ({"data": [torch.zeros(2, 1, 4, 4)]}, InputError, "labels"),
        ({"data": [(torch.zeros(0, 1, 4, 4), torch.zeros(0).long())]}, InputError, "without rows"),
        ({"data": [(torch.zeros(2, 1, 4, 4), "cat")]}, InputError, "no tensors"),
        ({"data": [{"x": torch.zeros(2, 1, 4, 4)}]}, InputError, "usual name"),
        ({"data": [(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]))]}, InputError, "0 to 2"),
        ({"data": [(torch.zeros(2, 1, 4, 4), torch.tensor([[0], [1]]))]}, InputError, "[2]"),
        ({"data": [(torch.zeros(2, 1, 4, 4), torch.zeros(2))]}, InputError, "[2, 3]"),
        ({"data": [(torch.zeros(2, 2, 4, 4), torch.tensor([0, 1]))]}, InputError, "does not take the data"),
        ({"data": [*batches(1), (torch.full((2, 1, 4, 4), torch.inf), torch.tensor([0, 1]))]}, ModelError, "step 2"),
        ({"val_data": []}, InputError, "val_data"),
    ],
)
def test_an_error_leaves_the_model(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = net()
    before = copy.deepcopy(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    data = options.pop("data", batches(1))
    with pytest.raises(error) as caught:
        finetune(model, data, **{"epochs": 2, "unfreeze": "head", **options})
    assert says in str(caught.value)
    assert same(model, before)
    assert model.training
    assert model[1].training  # not held any more
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_that_cannot_learn_is_refused() -> None:
    model = net()
    tt.freeze(model)
    with pytest.raises(SelectionError, match="unfreeze"):
        finetune(model, batches())
    with pytest.raises(ModelError, match="meta"):
        finetune(nn.Linear(2, 2, device="meta"), batches())
    with pytest.raises(ModelError, match="parameters"):
        finetune(nn.ReLU(), batches())
    with pytest.raises(HeadError, match="all of the model"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), batches(), unfreeze="head")


def test_the_moments_of_pruned_weights_are_zero_too() -> None:
    model = net()
    adam = torch.optim.AdamW(model.parameters())
    pruner = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5), include="5")
    finetune(model, batches(), epochs=1, optimizer=adam, pruner=pruner)
    gone = model[5].weight == 0
    assert int(gone.sum()) == 24
    assert bool((adam.state[model[5].weight]["exp_avg"][gone] == 0).all())
    assert pruner.optimizer is adam


def test_a_pruner_with_an_optimizer_of_before_goes_over_to_that_of_the_training() -> None:
    model = net()
    before, adam = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW(model.parameters())
    pruner = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5), optimizer=before, include="5")
    finetune(model, batches(), epochs=1, optimizer=adam, pruner=pruner)
    gone = model[5].weight == 0
    assert int(gone.sum()) == 24 and not bool(adam.state[model[5].weight]["exp_avg"][gone].any())


def test_a_batch_that_does_not_fit_is_named_by_its_number() -> None:
    """Also where several make a step."""
    wrong = (torch.zeros(2, 2, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(InputError, match=r"data\[3\].*does not take the data"):
        finetune(net(), [*batches(3), wrong], epochs=1, accumulate=2)
