"""What a training must not trip over: leftovers of others, odd data, options that would do nothing, odd optimizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from test_finetune import batches, same, twins
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import torchtrim as tt
from torchtrim.errors import CheckpointError, InputError, ModelError
from torchtrim.train.accelerating import accelerating
from torchtrim.train.finetune import finetune
from torchtrim.train.loop import Loop
from torchtrim.train.meter import Meter
from torchtrim.train.objective import Objective, accuracy
from torchtrim.train.rates import Rates
from torchtrim.train.shares import Shares


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def rows(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(1)


def pairs(size: int = 8) -> list[Any]:
    x, y = rows()
    return list(zip(x.split(size), y.split(size), strict=True))


def test_gradients_from_before_are_not_learnt_from() -> None:
    clean, dirty = twins(2)
    dirty.train()(100 * torch.randn(4, 1, 4, 4)).sum().backward()
    dirty[1].load_state_dict(clean[1].state_dict())
    assert dirty[0].weight.grad.abs().max() > 0
    for model in (clean, dirty):
        finetune(model, batches(), epochs=1)
    assert same(clean, dirty)


class Labelled(nn.Module):
    """As the models of transformers: labels among its arguments, its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        found = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return found | {"logits": logits}


def named() -> list[dict[str, torch.Tensor]]:
    return [{"x": x, "labels": labels} for x, labels in pairs()]


def test_a_model_with_a_loss_of_its_own_is_measured() -> None:
    done = finetune(Labelled(), named(), named(), epochs=30, lr=0.05)
    assert done.metric == "accuracy"
    assert done.epochs[-1].val_metric > 0.8
    seen: list[int] = []

    def halves(output: Any, targets: torch.Tensor) -> float:
        seen.append(len(targets))
        return 0.5

    assert finetune(Labelled(), named(), named(), epochs=1, metric=halves).epochs[0].val_metric == 0.5
    assert seen == [8] * 6


def test_a_criterion_comes_before_a_model_s_own_loss() -> None:
    def twice(output: Any, targets: torch.Tensor) -> torch.Tensor:
        return 2 * nn.functional.cross_entropy(output["logits"], targets)

    own, given = (finetune(Labelled(), named(), epochs=1, lr=1e-9, criterion=each) for each in (None, twice))
    assert given.epochs[0].loss == pytest.approx(2 * own.epochs[0].loss, rel=1e-4)
    with pytest.raises(InputError, match=r"label_smoothing.*criterion="):
        finetune(Labelled(), named(), epochs=1, label_smoothing=0.1)


def test_a_teacher_does_not_hide_labels_that_are_among_the_arguments() -> None:
    done = finetune(Labelled(), named(), named(), epochs=1, teacher=Labelled(), distill={"hints": None})
    assert set(done.epochs[0].parts) == {"hard", "soft"}
    words = [{"x": x, "labels": labels[:, None].repeat(1, 2)} for x, labels in pairs()]
    with pytest.raises(InputError, match="lined up"):
        finetune(Labelled(), words, epochs=1, teacher=Labelled(), distill={"hints": None})


class Sequences(nn.Module):
    """Classes last, and another output before the one that is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(x), 7), self.net(x)


def test_a_student_is_measured_by_the_output_that_it_learns() -> None:
    """Also where as many words as classes would let the axes be mixed up."""
    x = torch.randn(24, 3, 4, generator=torch.Generator().manual_seed(2))
    data = [(x, x[..., :3].argmax(-1))]
    distill = {"output": 1, "class_axis": -1, "hints": None, "alpha": 0.0}
    model = Sequences()
    done = finetune(model, data, data, epochs=60, lr=0.05, teacher=Sequences(), distill=distill)
    right = (model(x)[1].argmax(-1) == data[0][1]).float().mean()
    assert right > 0.8
    assert done.epochs[done.best - 1].val_metric == pytest.approx(right.item())


def test_a_student_that_says_yes_or_no_is_measured_so() -> None:
    x, _ = rows()
    data = [(x, (x[:, :3] > 0).float())]
    model = small()
    distill = {"task": "labels", "hints": None, "alpha": 0.0}
    done = finetune(model, data, data, epochs=1, teacher=small(), distill=distill)
    expected = nn.functional.binary_cross_entropy_with_logits(model(x), data[0][1])
    assert done.epochs[0].val_loss == pytest.approx(expected.item(), abs=1e-6)


def test_a_batch_that_a_student_does_not_take_says_so() -> None:
    with pytest.raises(InputError, match="does not take the data"):
        finetune(
            small(),
            [*pairs(), (torch.zeros(2, 5), torch.tensor([0, 1]))],
            epochs=1,
            teacher=small(),
            distill={"hints": None},
        )


def test_what_a_teacher_said_can_be_kept_without_more_words() -> None:
    done = finetune(small(), pairs(), epochs=2, teacher=small(), distill={"cache": True})
    assert "soft" in done.epochs[1].parts


def test_one_score_is_no_choice_between_classes() -> None:
    def yes_or_no(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(output[:, 0], targets.float())

    x, _ = rows()
    assert finetune(nn.Linear(4, 1), [(x, (x[:, 0] > 0).long())], epochs=1, criterion=yes_or_no).metric is None


def test_answers_that_do_not_count_are_not_counted() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, -100, 0])) == pytest.approx(2 / 3)
    assert accuracy(torch.eye(2), torch.tensor([-100, -100])) == 0


def test_a_metric_that_is_no_number_is_worse_than_any() -> None:
    answers = iter([torch.nan, 0.2, 0.1])
    model = small()

    def metric(output: torch.Tensor, targets: torch.Tensor) -> float:
        return 0.0 if model.training else next(answers)

    assert finetune(model, pairs(), pairs(24), epochs=3, metric=metric, patience=2).best == 2


def test_numpy_s_numbers_are_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": np.float64(0.01), "lrs": {"0": np.float32(0.5)}, "folder": tmp_path}
    finetune(small(), pairs(), epochs=1, **options)
    assert len(finetune(small(), pairs(), epochs=1, **options, resume=True).epochs) == 1


def test_a_checkpoint_does_not_look_through_all_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice an epoch: it takes most of a second."""
    looked: list[int] = []
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: looked.append(0) or {})
    finetune(small(), pairs(), pairs(), epochs=1, folder=tmp_path)
    assert not looked


SCHEDULES = [
    lambda rule: lr_scheduler.OneCycleLR(rule, 0.1, total_steps=12),
    lambda rule: lr_scheduler.CyclicLR(rule, 1e-3, 0.1, step_size_up=2, cycle_momentum=False),
    lambda rule: lr_scheduler.MultiStepLR(rule, [1, 2]),
    lambda rule: lr_scheduler.ReduceLROnPlateau(rule, patience=0, threshold=0.5),
    lambda rule: lr_scheduler.SequentialLR(
        rule, [lr_scheduler.LinearLR(rule), lr_scheduler.CosineAnnealingLR(rule, 3)], [2]
    ),
    "plateau",
]
OPTIMIZERS = ["sgd", torch.optim.Adagrad, torch.optim.NAdam, torch.optim.Rprop, torch.optim.Adafactor]


def mixed(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    share, order = float(np.random.beta(0.4, 0.4)), torch.randperm(len(x))
    soft = nn.functional.one_hot(y, 3).float()
    return share * x + (1 - share) * x[order], share * soft + (1 - share) * soft[order]


@pytest.mark.parametrize("number", range(6))
def test_every_optimizer_and_schedule_goes_on_to_the_same_bits(tmp_path: Path, number: int) -> None:
    made = OPTIMIZERS[number % 5]
    options: dict[str, Any] = {"epochs": 4, "schedule": SCHEDULES[number], "lr": 0.01, "ema": 0.5}
    options |= {"optimizer": made if isinstance(made, str) else lambda groups: made(groups)}
    whole, broken = small(), small()
    once = finetune(whole, pairs(), pairs(), **options, mixup=mixed)

    def stop(epoch: int, _: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(small(), pairs(), pairs(), **options, mixup=mixed, folder=tmp_path, on_epoch=stop)
    again = finetune(broken, pairs(), pairs(), **options, mixup=mixed, folder=tmp_path, resume=True)
    assert same(broken, whole)
    assert [(epoch.lr, epoch.val_loss) for epoch in again.epochs] == [
        (epoch.lr, epoch.val_loss) for epoch in once.epochs
    ]


class Jittered(TensorDataset):
    """Rows with noise that is drawn in the workers."""

    def __getitem__(self, index: int) -> Any:
        x, label = super().__getitem__(index)
        return x + 0.1 * torch.randn(4), label


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_go_on_to_the_same_bits(tmp_path: Path, persistent: bool) -> None:
    def loader() -> DataLoader[Any]:
        data = Jittered(*rows())
        return DataLoader(data, batch_size=8, shuffle=True, num_workers=1, persistent_workers=persistent)

    def stop(epoch: int, _: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    example = torch.zeros(2, 4)
    whole, broken = small(), small()
    finetune(whole, loader(), epochs=2, example_inputs=example)
    with pytest.raises(KeyboardInterrupt):
        finetune(small(), loader(), epochs=2, example_inputs=example, folder=tmp_path, on_epoch=stop)
    finetune(broken, loader(), epochs=2, example_inputs=example, folder=tmp_path, resume=True)
    assert same(whole, broken)


def test_another_schedule_is_another_training(tmp_path: Path) -> None:
    first, second = SCHEDULES[2], SCHEDULES[3]
    finetune(small(), pairs(), epochs=1, schedule=first, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"schedule.*MultiStepLR.*ReduceLROnPlateau"):
        finetune(small(), pairs(), epochs=1, schedule=second, folder=tmp_path, resume=True)


def test_what_decides_about_the_best_is_part_of_a_training(tmp_path: Path) -> None:
    finetune(small(), pairs(), pairs(), epochs=1, keep="last", folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"keep.*last.*best"):
        finetune(small(), pairs(), pairs(), epochs=1, folder=tmp_path, resume=True)
    ordered = DataLoader(TensorDataset(*rows()), shuffle=True, generator=torch.Generator())
    with pytest.raises(CheckpointError, match="generators"):
        finetune(small(), ordered, pairs(), epochs=1, keep="last", folder=tmp_path / "x", resume=True)
        finetune(small(), list(ordered), pairs(), epochs=1, keep="last", folder=tmp_path / "x", resume=True)


class Closed(lr_scheduler.StepLR):
    """A schedule with a state that cannot be read again safely."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.where = Path()
        super().__init__(optimizer, 1)


def test_a_state_that_could_not_be_read_again_is_known_before_the_training(tmp_path: Path) -> None:
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="Closed"):
        finetune(model, pairs(), epochs=1, schedule=Closed, folder=tmp_path)
    assert same(model, before)
    torch.save({"format": 1}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="state of a training"):
        finetune(model, pairs(), epochs=1, folder=tmp_path, resume=True)


def test_a_plateau_lowers_the_rate() -> None:
    answers = iter([1.0, 1.0, 1.0, 1.0, 1.0])
    done = finetune(
        small(),
        pairs(),
        pairs(24),
        epochs=5,
        lr=0.1,
        schedule="plateau",
        criterion=lambda output, targets: (
            nn.functional.cross_entropy(output, targets) if output.requires_grad else torch.tensor(next(answers))
        ),
    )
    assert [epoch.lr for epoch in done.epochs] == pytest.approx([0.1] * 4 + [0.01])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from TensorDataset(*rows())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train_data": DataLoader(Stream(), batch_size=8), "warmup": 5}, "a share below 1"),
        ({"schedule_by": "epoch"}, "schedule_by"),
        ({"own": True, "layer_decay": 0.5}, "layer_decay"),
        ({"own": True, "lrs": {"0": 0.1}}, "lrs"),
        ({"penalty": 3}, "SparsityPenalty"),
        ({"penalty": "another"}, "another model"),
        ({"optimizer": lambda groups: torch.optim.LBFGS(p for g in groups for p in g["params"])}, "closure"),
        ({"train_data": [(rows()[0], rows()[0][:, :3])], "label_smoothing": 0.1}, "label_smoothing"),
        ({"train_data": [(torch.zeros(1, 4), torch.tensor([0]))], "norm": True}, "drop_last"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options: dict[str, Any], says: str) -> None:
    model = small()
    if options.pop("norm", False):
        model[1] = nn.BatchNorm1d(8)
    if options.pop("own", False):
        options["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    if options.get("penalty") == "another":
        options["penalty"] = tt.SparsityPenalty(small(), torch.zeros(2, 4))
    with pytest.raises(InputError, match=says):
        finetune(model, options.pop("train_data", pairs()), epochs=2, **options)


def test_what_is_kept_is_the_mean_of_the_weights_after_each_step() -> None:
    model = small()
    weight = model[0].weight
    mean, steps = weight.detach().clone(), 0
    own = torch.optim.SGD(model.parameters(), lr=0.5)

    def follow(*_: Any) -> None:
        nonlocal mean, steps
        decay = min(0.3, (1 + steps) / (10 + steps))
        mean, steps = decay * mean + (1 - decay) * weight.detach(), steps + 1

    own.register_step_post_hook(follow)
    finetune(model, pairs(), epochs=3, optimizer=own, ema=0.3)
    assert steps == 9
    assert torch.allclose(weight, mean, atol=1e-6)


def test_what_the_optimizer_does_not_hold_is_told() -> None:
    model = small()
    own = torch.optim.SGD(model[2].parameters(), lr=0.1)
    done = finetune(model, pairs(), epochs=1, optimizer=own)
    assert done.trained == 27
    assert "not in the optimizer" in str(done)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_no_number_is_told_before_the_step_that_prunes() -> None:
    steps: list[int] = []

    def criterion(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        return nn.functional.cross_entropy(output, targets) * (torch.nan if len(steps) == 2 else 1)

    model = small()
    own = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = tt.PolynomialDecay(0.2, 0.5, end=4, every=1)
    with pytest.raises(ModelError, match=r"epoch 1, step 2"):
        finetune(
            model,
            pairs(),
            epochs=1,
            criterion=criterion,
            optimizer=own,
            pruner=lambda net, rule: tt.MagnitudePruner(net, schedule, optimizer=rule, include=["0"]),
        )
    assert all(state["momentum_buffer"].isfinite().all() for state in own.state.values())


def test_nothing_is_left_of_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
    GradientState._reset_state()
    finetune(small(), pairs(), epochs=1)
    assert not PartialState._shared_state
    assert not AcceleratorState._shared_state
    assert not GradientState._shared_state


@pytest.fixture
def users() -> Any:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_an_accelerator_of_the_program_is_left_alone_and_hinders_nothing(users: Any) -> None:
    users.gradient_state._set_sync_gradients(False)  # in the middle of a window of its own
    alone, model = small(), small()
    before = copy.deepcopy(model)
    finetune(model, pairs(), epochs=1)
    assert not same(model, before)
    assert users.gradient_accumulation_steps == 4
    assert not users.sync_gradients
    del alone


def test_an_accelerator_of_ones_own_is_left_alone(users: Any) -> None:
    users.gradient_accumulation_steps = 1
    users.gradient_state._set_sync_gradients(False)
    model = small()
    before = copy.deepcopy(model)
    for _ in range(2):
        done = finetune(model, pairs(), epochs=1, accelerator=users)
    assert not same(model, before)
    assert users._optimizers == []
    assert not users.sync_gradients
    assert done.precision == "float32"


def test_an_accelerator_that_shards_is_refused(users: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    users.gradient_accumulation_steps = 1
    monkeypatch.setattr(type(users), "distributed_type", DistributedType.FSDP)
    with pytest.raises(InputError, match=r"whole models.*FSDP"):
        finetune(small(), pairs(), epochs=1, accelerator=users)


class Scaled:
    """An accelerator with a scaler of losses, as in fp16 on a GPU; on a processor."""

    def __init__(self, fabric: Any) -> None:
        self._fabric, self.scaler = fabric, torch.amp.GradScaler("cpu", init_scale=1024.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric, name)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        from accelerate.optimizer import AcceleratedOptimizer

        return AcceleratedOptimizer(optimizer, scaler=self.scaler)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()


def test_scaled_losses_are_unscaled_once() -> None:
    """Before a penalty's gradients are added and all are clipped."""
    scaled, plain = small(), small()
    for model in (scaled, plain):
        with accelerating() as fabric:
            rule = torch.optim.SGD(model.parameters(), lr=0.5)
            loop = Loop(
                model,
                Scaled(fabric) if model is scaled else fabric,
                rule,
                Rates.of("constant", rule, epochs=1, steps=3),
                Objective(),
                penalty=tt.SparsityPenalty(model, torch.zeros(2, 4), strength=0.1),
                clip_norm=0.3,
            )
            loop.train(Shares(pairs()), 0)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(scaled.parameters(), plain.parameters(), strict=True))


def test_a_sampler_that_shares_out_by_itself_is_refused() -> None:
    data = TensorDataset(*rows())
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    assert len(list(Shares(loader))) == 2
    with pytest.raises(InputError, match=r"DistributedSampler.*shuffle=True"):
        Shares(loader, 0, 2)


def test_a_sampler_is_told_the_epoch(tmp_path: Path) -> None:
    told: list[int] = []

    class Told(DistributedSampler[Any]):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)
            super().set_epoch(epoch)

    data = TensorDataset(*rows())
    loader = DataLoader(data, batch_size=8, sampler=Told(data, num_replicas=1, rank=0))
    finetune(small(), loader, epochs=2)
    assert told == [0, 1]


def test_a_loader_with_an_order_of_its_own_is_gone_through_as_it_is() -> None:
    class Backwards(DataLoader[Any]):
        def __iter__(self) -> Any:
            yield from reversed(list(super().__iter__()))

    shares = list(Shares(Backwards(TensorDataset(torch.arange(6)), batch_size=2), 1, 2))
    assert [share.batch[0].tolist() for share in shares] == [[5], [3], [1]]


def test_sums_are_added_up_where_the_accelerator_is() -> None:
    class Elsewhere:
        num_processes, device = 2, torch.device("meta")

        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            assert (tensor.device.type, reduction) == ("meta", "sum")
            return torch.ones(2, dtype=tensor.dtype)

    meter = Meter(Elsewhere())
    meter.add("loss", 0.5, rows=4)  # a plain number, as a metric of one's own may be
    assert meter.means() == {"loss": 1.0}
