"""The callbacks in the real trainers: Lightning's, and Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import Trainer, TrainingArguments

import torchtrim as tt
from torchtrim.errors import CheckpointError, InputError
from torchtrim.train.lightning_callback import LightningTrim
from torchtrim.train.transformers_callback import TransformersTrim

SCHEDULE = tt.PolynomialDecay(0.25, 0.5, begin=1, end=4, every=2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def rows(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].argmax(1)


class Lit(lightning.LightningModule):
    def __init__(self, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network()
        self.distiller = None if teacher is None else tt.Distiller(self.net, teacher, temperature=2.0)
        self.seen: list[tuple[float, int]] = []

    def training_step(self, batch: Any, _number: int) -> torch.Tensor:
        zeros = float((self.net[2].weight == 0).float().mean())
        self.seen.append((zeros, sum(p.numel() for p in self.net.parameters() if p.requires_grad)))
        if self.distiller is not None:
            loss: torch.Tensor = self.distiller(*batch).loss
            return loss
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)


def lit_trainer(folder: Path, callback: LightningTrim, **options: Any) -> lightning.Trainer:
    every = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_epochs=1)
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=[callback, every],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, **options},
    )


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows()), batch_size=16)


@pytest.mark.filterwarnings("ignore")
def test_lightning_prunes_unfreezes_and_records(tmp_path: Path) -> None:
    module = Lit(teacher=network())
    callback = LightningTrim("net", pruner=SCHEDULE, unfreeze={0: "4", 1: "all"})
    lit_trainer(tmp_path, callback).fit(module, loader())
    shares = [zeros for zeros, _ in module.seen]
    assert shares[:3] == [0, 0, 0.25]  # the first pruning is at step 1
    assert float((module.net[2].weight == 0).float().mean()) == 0.5
    assert [count for _, count in module.seen] == [51, 51, *[467] * 4]
    assert all(parameter.requires_grad for parameter in module.net.parameters())
    assert [edit.kind for edit in tt.history(module.net).edits] == ["sparsify"]


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_steps_not_batches(tmp_path: Path) -> None:
    callback = LightningTrim("net", pruner=SCHEDULE)
    lit_trainer(tmp_path, callback, accumulate_grad_batches=2).fit(Lit(), loader())
    assert callback.pruner.steps == 3


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_with_the_masks(tmp_path: Path) -> None:
    whole, broken = Lit(), Lit()
    lit_trainer(tmp_path / "a", LightningTrim("net", pruner=SCHEDULE)).fit(whole, loader())
    lit_trainer(tmp_path / "b", LightningTrim("net", pruner=SCHEDULE)).fit(Lit(), loader())
    first = min((tmp_path / "b").iterdir())
    lit_trainer(tmp_path / "c", LightningTrim("net", pruner=SCHEDULE)).fit(broken, loader(), ckpt_path=first)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), broken.net.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_after_a_break_in_lightning_everything_learns_again(tmp_path: Path) -> None:
    class Failing(Lit):
        def training_step(self, batch: Any, _number: int) -> torch.Tensor:
            raise RuntimeError("broken off")

    module = Failing()
    with pytest.raises(RuntimeError, match="broken off"):
        lit_trainer(tmp_path, LightningTrim("net", unfreeze={0: "4"})).fit(module, loader())
    assert all(parameter.requires_grad for parameter in module.net.parameters())


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, labels = rows()
        return {"x": x[index], "labels": labels[index]}


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=0.05,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )


def test_transformers_prunes_unfreezes_and_records(tmp_path: Path) -> None:
    model = Labelled()
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda module, _args: counts.append(sum(p.numel() for p in module.parameters() if p.requires_grad))
    )
    callback = TransformersTrim(pruner=SCHEDULE, unfreeze={0: "net.4", 1: "all"})
    Trainer(model, arguments(tmp_path), train_dataset=Rows(), callbacks=[callback]).train()
    assert callback.pruner.steps == 6
    assert float((model.net[2].weight == 0).float().mean()) == 0.5
    assert counts == [51, 51, *[467] * 4]
    assert [edit.kind for edit in tt.history(model).edits] == ["sparsify"]


def test_transformers_counts_epochs_where_steps_were_asked_for(tmp_path: Path) -> None:
    model = Labelled()
    callback = TransformersTrim(unfreeze={0: "net.4", 4: "all"})
    before = model.net[0].weight.detach().clone()
    Trainer(model, arguments(tmp_path, max_steps=10), train_dataset=Rows(), callbacks=[callback]).train()
    assert not torch.equal(model.net[0].weight, before)  # in the fifth epoch


def test_transformers_goes_on_with_the_masks(tmp_path: Path) -> None:
    whole, broken = Labelled(), Labelled()
    Trainer(
        whole, arguments(tmp_path / "a"), train_dataset=Rows(), callbacks=[TransformersTrim(pruner=SCHEDULE)]
    ).train()
    again = Trainer(
        broken, arguments(tmp_path / "a"), train_dataset=Rows(), callbacks=[TransformersTrim(pruner=SCHEDULE)]
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))
    (tmp_path / "a" / "checkpoint-2" / "torchtrim.pt").unlink()
    once_more = Trainer(
        Labelled(), arguments(tmp_path / "a"), train_dataset=Rows(), callbacks=[TransformersTrim(pruner=SCHEDULE)]
    )
    with pytest.raises(CheckpointError, match="no masks"):
        once_more.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_distilling_in_a_trainer_of_transformers(tmp_path: Path) -> None:
    teacher = Labelled()
    student = Labelled()

    class Distilling(Trainer):
        distiller = tt.Distiller(student, teacher, output="logits")

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            result = self.distiller({"x": inputs["x"]}, inputs["labels"])
            return (result.loss, {"logits": result.output}) if return_outputs else result.loss

    before = student.net[0].weight.detach().clone()
    Distilling(student, arguments(tmp_path), train_dataset=Rows()).train()
    assert not torch.equal(before, student.net[0].weight)


@pytest.mark.parametrize("wrong", [3, lambda model, optimizer: None, "half"])
def test_what_is_no_pruner_is_refused(tmp_path: Path, wrong: Any) -> None:
    callback = TransformersTrim(pruner=wrong)
    with pytest.raises(InputError, match="pruner"):
        Trainer(Labelled(), arguments(tmp_path), train_dataset=Rows(), callbacks=[callback]).train()
