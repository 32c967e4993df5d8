"""`tt.Distiller`: the losses against formulas written out, the teacher left as it was, and what is refused."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchtrim as tt
from torchtrim.train.hint_losses import angle_loss, attention_loss, distance_loss, features_loss
from torchtrim.train.soft_targets import averaged, soft_classes, soft_labels


def net(width: int, classes: int = 3, *, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, classes))


def batch(rows: int = 16, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 8), torch.randint(0, classes, (rows,))


class Returns(nn.Module):
    """Gives its output in another form."""

    def __init__(self, inner: nn.Module, form: Any) -> None:
        super().__init__()
        self.inner, self.form = inner, form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(self.inner(x))


def test_the_loss_is_hintons_to_the_digit() -> None:
    student, teacher = net(4), net(32)
    x, y = batch()
    result = tt.Distiller(student, teacher, temperature=3.0, alpha=0.7)(x, y)
    s, t = student(x), teacher(x)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    soft = 9 * (p * (p.log() - q.log())).sum(1).mean()
    hard = F.cross_entropy(s, y)
    assert torch.allclose(result.parts["soft"], soft, atol=1e-6)
    assert torch.allclose(result.parts["hard"], hard)
    assert torch.allclose(result.loss, 0.3 * hard + 0.7 * soft, atol=1e-6)
    assert torch.equal(result.output, s)
    assert result.weights == pytest.approx({"hard": 0.3, "soft": 0.7})
    with pytest.raises(FrozenInstanceError):
        result.loss = hard  # type: ignore[misc]


def test_the_gradients_keep_their_size_at_any_temperature() -> None:
    student, teacher = torch.randn(64, 10), torch.randn(64, 10)
    sizes = []
    for temperature in (20.0, 200.0):
        logits = student.clone().requires_grad_()
        soft_classes(logits, teacher, temperature).backward()
        assert logits.grad is not None
        sizes.append(float(logits.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_dense_outputs_average_over_places() -> None:
    student, teacher = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 3)
    flat = [value.permute(0, 2, 3, 1).reshape(-1, 5) for value in (student, teacher)]
    assert torch.allclose(soft_classes(student, teacher, 2.0), soft_classes(*flat, 2.0), atol=1e-6)
    last = [value.permute(0, 2, 3, 1) for value in (student, teacher)]
    assert torch.allclose(soft_classes(*last, 2.0, class_axis=3), soft_classes(*flat, 2.0), atol=1e-6)
    mask = torch.rand(2, 4, 3) > 0.5
    kept = [value[mask.flatten()] for value in flat]
    assert torch.allclose(soft_classes(student, teacher, 2.0, mask=mask), soft_classes(*kept, 2.0), atol=1e-6)


def test_labels_are_divergences_of_two_outcomes() -> None:
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    two = [torch.stack([value, torch.zeros_like(value)], 1) for value in (student, teacher)]
    assert torch.allclose(soft_labels(student, teacher, 2.5), soft_classes(*two, 2.5), atol=1e-6)
    extreme = torch.tensor([[1000.0, -1000.0]])
    assert torch.isfinite(soft_labels(extreme, -extreme, 1.0))


def test_multi_label_and_regression() -> None:
    x = torch.randn(8, 8)
    student, teacher = net(4), net(16)
    yes = (torch.rand(8, 3) > 0.5).long()
    result = tt.Distiller(student, teacher, task="labels")(x, yes)
    assert torch.allclose(result.parts["hard"], F.binary_cross_entropy_with_logits(student(x), yes.float()))
    values = torch.randn(8, 3)
    result = tt.Distiller(student, teacher, task="values")(x, values)
    assert torch.allclose(result.parts["hard"], F.mse_loss(student(x), values))
    assert torch.allclose(result.parts["soft"], F.mse_loss(student(x), teacher(x)))
    one = tt.Distiller(net(4, 1), net(16, 1), task="labels")(x, torch.ones(8))
    assert set(one.parts) == {"hard", "soft"}


def test_what_one_output_or_soft_targets_mean_has_to_be_said() -> None:
    x = torch.randn(8, 8)
    with pytest.raises(tt.InputError, match=r"task='labels'.*task='values'"):
        tt.Distiller(net(4, 1), net(16, 1))(x)
    with pytest.raises(tt.InputError, match=r"probabilities.*task='labels'"):
        tt.Distiller(net(4), net(16))(x, torch.randn(8, 3))


def test_without_labels_the_hard_part_is_left_out() -> None:
    distiller = tt.Distiller(net(4), net(32), alpha=0.7)
    result = distiller(batch()[0])
    assert set(result.parts) == {"soft"} and result.weights == {"soft": 0.7}
    assert torch.allclose(result.loss, 0.7 * result.parts["soft"])
    with pytest.raises(tt.InputError, match="nothing is left"):
        tt.Distiller(net(4), net(32), alpha=0)(batch()[0])


def test_mixed_labels_and_smoothing() -> None:
    student, (x, y) = net(4), batch()
    mixed = 0.3 * F.one_hot(y, 3) + 0.7 * F.one_hot(y.roll(1), 3)
    result = tt.Distiller(student, net(32), label_smoothing=0.1)(x, mixed)
    assert torch.allclose(result.parts["hard"], F.cross_entropy(student(x), mixed, label_smoothing=0.1))
    own = tt.Distiller(student, net(32), criterion=lambda output, targets: output.square().sum() + targets.sum())
    assert torch.allclose(own(x, y).parts["hard"], student(x).square().sum() + y.sum())


def test_sequences_with_padding() -> None:
    student, teacher = nn.Linear(8, 5), nn.Linear(8, 5)
    x, y = torch.randn(2, 6, 8), torch.randint(0, 5, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    distiller = tt.Distiller(student, teacher, class_axis=-1)
    result = distiller(x, y, mask=mask)
    assert torch.allclose(result.parts["hard"], F.cross_entropy(student(x)[mask], y[mask]))
    assert torch.allclose(result.parts["soft"], soft_classes(student(x)[mask], teacher(x)[mask], 4.0), atol=1e-6)
    ignored = distiller(x, y.masked_fill(~mask, -100))
    assert torch.allclose(ignored.parts["hard"], result.parts["hard"])
    with pytest.raises(tt.InputError, match="class_axis=-1 for sequences"):
        tt.Distiller(student, teacher)(x, y)
    with pytest.raises(tt.InputError, match="truth value for each position"):
        distiller(x, y, mask=mask[:, :2])
    assert float(averaged(torch.ones(3), torch.zeros(3, dtype=torch.bool))) == 0


def test_segmentation() -> None:
    student, teacher = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
    x, y = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
    y[0, :2] = -100
    result = tt.Distiller(student, Returns(teacher, lambda out: {"out": out, "aux": out}))(x, y)
    assert torch.allclose(result.parts["hard"], F.cross_entropy(student(x), y))


def test_outputs_in_other_forms() -> None:
    x, y = batch()
    student, teacher = net(4), net(32)
    expected = tt.Distiller(student, teacher)(x, y).to_dict()["loss"]
    forms: list[tuple[Any, Any]] = [
        (lambda out: {"state": out.sum(), "logits": out}, None),
        (lambda out: (out,), None),
        (lambda out: (out * 0, out), 1),
        (lambda out: {"a": out, "b": 2 * out}, "a"),
        (lambda out: {"a": [2 * out, out]}, lambda found: found["a"][1]),
    ]
    for form, output in forms:
        distiller = tt.Distiller(Returns(student, form), teacher, output=output)
        assert distiller(x, y).to_dict()["loss"] == pytest.approx(expected)
        distiller = tt.Distiller(student, Returns(teacher, form), teacher_output=output)
        assert distiller(x, y).to_dict()["loss"] == pytest.approx(expected)
    with pytest.raises(tt.InputError, match=r"student: .*output='a', output='b'"):
        tt.Distiller(Returns(student, forms[3][0]), teacher)(x)
    with pytest.raises(tt.InputError, match=r"teacher: .*no such entry.*'logits'"):
        tt.Distiller(student, Returns(teacher, forms[0][0]), output="logit")(x)


def test_transformers_models() -> None:
    transformers = importlib.import_module("transformers")
    sizes = {"vocab_size": 40, "num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3}
    teacher = transformers.BertForSequenceClassification(
        transformers.BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=4, **sizes)
    )
    student = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(dim=8, hidden_dim=16, n_layers=2, n_heads=2, **sizes)
    )
    ids = torch.randint(0, 40, (4, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    hints = {"distilbert.transformer.layer.1": "bert.encoder.layer.3"}
    distiller = tt.Distiller(student, teacher, hints=hints, example_inputs=inputs)
    result = distiller(inputs, torch.tensor([0, 1, 2, 0]))
    result.loss.backward()
    assert result.output.shape == (4, 3)
    (projection,) = distiller.projections.values()
    assert isinstance(projection, nn.Linear) and (projection.in_features, projection.out_features) == (8, 16)


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = net(32, dropout=0.5).train()
    teacher[0].eval()
    teacher[3].bias.requires_grad_(False)
    seen: list[bool] = []
    teacher[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    flags = [module.training for module in teacher.modules()]
    weights = copy.deepcopy(teacher.state_dict())
    distiller = tt.Distiller(net(4), teacher)
    x, y = batch()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = distiller(x, y), distiller(x, y)
    assert torch.equal(torch.rand(3), expected)  # dropout in the teacher drew nothing
    assert torch.equal(first.loss, second.loss)
    (first.loss + second.loss).backward()
    distiller.train()
    distiller.eval()
    distiller.requires_grad_(True)
    assert [module.training for module in teacher.modules()] == flags
    assert seen == [False, False]
    assert [p.requires_grad for p in teacher.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in teacher.parameters())
    assert len(teacher[1]._forward_hooks) == 1
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())


def test_batch_norm_statistics_move_in_the_student_only() -> None:
    student, teacher = (nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(2))
    tt.Distiller(student, teacher).train()(batch()[0])
    assert int(student[1].num_batches_tracked) == 1 and int(teacher[1].num_batches_tracked) == 0
    assert teacher[1].training


def test_the_teacher_is_outside_and_follows() -> None:
    student, teacher = net(4), net(32)
    distiller = tt.Distiller(student, teacher, hints={"1": "1"}, example_inputs=batch()[0])
    assert {name.partition(".")[0] for name in distiller.state_dict()} == {"student", "projections"}
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in distiller.parameters()}
    assert distiller.teacher is teacher and teacher not in set(distiller.modules())
    plain = tt.Distiller(net(4), net(32))
    assert list(plain.projections.parameters()) == []
    distiller.double()
    assert teacher[0].weight.dtype == torch.float32  # the type is the student's alone
    assert torch.isfinite(distiller(batch()[0].double()).loss)


def test_the_student_is_left_as_it_was() -> None:
    student = net(4)
    keys = list(student.state_dict())
    with tt.Distiller(student, net(32), hints={"1": "1"}, example_inputs=batch()[0]) as distiller:
        distiller(batch()[0]).loss.backward()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    assert list(student.state_dict()) == keys
    with pytest.raises(tt.ModelError, match="closed"):
        distiller(batch()[0])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tt.Distiller(student, net(32), hints={"1": "1"}, example_inputs=batch()[0])(torch.zeros(2, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_deepcopy_is_independent_and_equal() -> None:
    x, y = batch()
    distiller = tt.Distiller(net(4), net(32), hints={"1": "1"}, balance=True, example_inputs=x)
    twin = copy.deepcopy(distiller)
    assert torch.equal(twin(x, y).loss, distiller(x, y).loss)
    with torch.no_grad():
        twin.student[0].weight.zero_()
        twin.teacher[0].weight.zero_()
    assert not torch.equal(twin(x, y).loss, distiller(x, y).loss)
    assert float(distiller.teacher[0].weight.detach().abs().sum()) > 0


def test_weights_by_name_and_further_losses() -> None:
    x, y = batch()
    student, teacher = net(4), net(32)
    distiller = tt.Distiller(
        student,
        teacher,
        weights={"hard": 0, "soft": 2.0, "logits": 0.5},
        losses={"logits": nn.functional.mse_loss},
    )
    result = distiller(x, y)
    assert set(result.parts) == {"soft", "logits"}
    assert torch.allclose(result.loss, 2 * result.parts["soft"] + 0.5 * F.mse_loss(student(x), teacher(x)))
    distiller.weights["soft"] = 0.0
    assert torch.allclose(distiller(x, y).loss, 0.5 * F.mse_loss(student(x), teacher(x)))
    distiller.weights["hrad"] = 1.0
    with pytest.raises(tt.SelectionError, match="hrad"):
        distiller(x, y)
    with pytest.raises(tt.SelectionError, match=r"'hrad'.*'hard'"):
        tt.Distiller(student, teacher, weights={"hrad": 1})
    with pytest.raises(tt.SelectionError, match="nothing to learn"):
        tt.Distiller(student, teacher, weights={"hard": 0, "soft": 0})
    with pytest.raises(tt.InputError, match="weight is a number"):
        tt.Distiller(student, teacher, weights={"soft": -1})
    with pytest.raises(tt.InputError, match="one number"):
        tt.Distiller(student, teacher, losses={"each": lambda a, b: (a - b).square()})(x)
    with pytest.raises(tt.InputError, match="taken"):
        tt.Distiller(student, teacher, losses={"soft": F.mse_loss})


def test_balanced_parts_are_of_one_size() -> None:
    x, y = batch()
    distiller = tt.Distiller(net(4), net(32), balance=True, losses={"large": lambda a, b: 1e6 * F.mse_loss(a, b)})
    result = distiller(x, y)
    assert float(result.loss.detach()) == pytest.approx(0.5 + 0.5 + 1.0, rel=1e-4)
    state = {name: value.clone() for name, value in distiller.state_dict().items()}
    distiller.eval()(x, y)
    assert all(torch.equal(value, state[name]) for name, value in distiller.state_dict().items())
    distiller.train()(x)  # without labels: the mean of the hard part stays
    assert torch.equal(distiller.balance.means[0], state["balance.means"][0])
    shares = {name: float(part.detach() * result.weights[name]) for name, part in result.parts.items()}
    assert shares == pytest.approx({"hard": 0.5, "soft": 0.5, "large": 1.0}, rel=1e-4)
    nan = tt.Distiller(net(4), net(32), balance=True)
    nan.balance({"hard": torch.tensor(float("nan"))})
    assert torch.isfinite(nan.balance.means).all()


def test_the_teacher_in_half_precision() -> None:
    student, teacher = net(4), net(32)
    x, y = batch()
    distiller = tt.Distiller(student, teacher, hints={"1": "1"}, teacher_dtype=torch.bfloat16, example_inputs=x)
    assert distiller.teacher[0].weight.dtype == torch.bfloat16 and teacher[0].weight.dtype == torch.float32
    result = distiller(x, y)
    whole = tt.Distiller(student, teacher)(x, y)
    assert result.loss.dtype == torch.float32
    assert result.parts["soft"].item() == pytest.approx(whole.parts["soft"].item(), rel=0.05)
    assert not torch.equal(result.parts["soft"], whole.parts["soft"])


def test_autocast() -> None:
    x, y = batch()
    distiller = tt.Distiller(
        net(4), net(32), hints={"1": "1", "rel": tt.Hint("1", loss="relational")}, example_inputs=x
    )
    whole = distiller(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distiller(x, y)
    assert result.output.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in (result.loss, *result.parts.values()))
    for name, part in result.parts.items():
        assert part.item() == pytest.approx(whole.parts[name].item(), rel=0.1, abs=0.01)
    result.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in distiller.parameters())


def test_compiled_students() -> None:
    x, y = batch()
    student, teacher = net(4), net(32)
    compiled = torch.compile(student, backend="eager")
    expected = tt.Distiller(student, teacher)(x, y).loss
    assert torch.allclose(tt.Distiller(compiled, teacher)(x, y).loss, expected)
    with pytest.raises(tt.ModelError, match="compiled"):
        tt.Distiller(compiled, teacher, hints={"1": "1"}, example_inputs=x)


def test_printing() -> None:
    x, y = batch()
    distiller = tt.Distiller(net(4), net(32), hints={"1": "1"}, example_inputs=x)
    text = str(distiller.terms)
    assert "KL, T=4" in text and "Linear(in_features=4, out_features=32" in text and "1 [16, 4]" in text
    assert [term["name"] for term in distiller.terms.to_dict()["terms"]] == ["hard", "soft", "1"]
    result = distiller(x, y)
    assert result.to_dict()["loss"] == pytest.approx(float(result.loss))
    assert "<table>" in result._repr_html_() and "<table>" in distiller.terms._repr_html_()


def test_what_losses_promise() -> None:
    a, b = torch.randn(7, 6, 4, 4), torch.randn(7, 9, 4, 4)
    assert 0 < float(attention_loss(a, b)) < 2
    tokens = [value.flatten(2).transpose(1, 2) for value in (a, b)]
    assert torch.allclose(attention_loss(a, b), attention_loss(*tokens, axis=-1))
    rows, columns = a.flatten(1), torch.linalg.qr(torch.randn(96, 96))[0]
    turned = 3 * rows @ columns + 1  # turned, scaled and moved: the relations are the same
    assert float(distance_loss(rows, turned)) < 1e-6 and float(angle_loss(rows, turned)) < 1e-6
    assert float(distance_loss(rows, b)) > 1e-3 and float(angle_loss(rows, b)) > 1e-3
    for loss in (distance_loss, angle_loss, attention_loss, features_loss):
        one, same = torch.randn(1, 4, 2, 2).requires_grad_(), torch.ones(2, 4, 2, 2).requires_grad_()
        for value in (one, same):
            loss(value, torch.randn(value.shape)).backward()
            assert value.grad is not None and torch.isfinite(value.grad).all(), loss
    distances = torch.cdist(rows, rows)
    expected = distances / distances.sum() * (7 * 6)
    other = torch.cdist(b.flatten(1), b.flatten(1))
    wanted = F.smooth_l1_loss(expected, other / other.sum() * (7 * 6))
    assert torch.allclose(distance_loss(rows, b), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature.*above 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "4"}, "temperature"),
        ({"alpha": 1.5}, "alpha.*from 0 to 1"),
        ({"alpha": -0.1}, "alpha"),
        ({"label_smoothing": 2}, "label_smoothing"),
        ({"task": "class"}, "task"),
        ({"criterion": nn.CrossEntropyLoss}, "class, not a loss"),
        ({"criterion": 3}, "not a loss function"),
        ({"criterion": F.cross_entropy, "label_smoothing": 0.1}, "label smoothing"),
        ({"losses": [F.mse_loss]}, "functions by name"),
        ({"weights": [1, 2]}, "by name"),
        ({"hints": {"1": "1"}}, "input shapes of these models are not known"),
        ({"hints": {"1": 1}}, "address"),
        ({"hints": 3}, "mapping"),
        ({"hints": {"soft": "1"}, "example_inputs": torch.zeros(1, 8)}, "taken"),
        ({"hints": {"fc": "1"}, "example_inputs": torch.zeros(1, 8)}, "no such place"),
        ({"hints": {"soft": tt.Hint("1")}, "example_inputs": torch.zeros(1, 8)}, "taken"),
        ({"hints": {"": "1"}}, "address"),
        ({"hints": {":linear": ""}, "example_inputs": torch.zeros(1, 8)}, "no such call"),
        ({"hints": ["1"], "example_inputs": torch.zeros(1, 5)}, "student does not take the example inputs"),
        ({"teacher_dtype": torch.int8}, "teacher_dtype"),
        ({"cache": True, "hints": {"1": "1"}, "example_inputs": torch.zeros(1, 8)}, "inside it"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tt.TorchTrimError, match=message):
        tt.Distiller(net(4), net(32), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("abc", "not a batch"),
        (None, "not a batch"),
        ([], "no tensor"),
        (torch.tensor(3.0), "without samples"),
        (torch.zeros(0, 8), "without samples"),
        ({}, "no tensor"),
    ],
)
def test_no_batches(given: Any, message: str) -> None:
    with pytest.raises(tt.InputError, match=message):
        tt.Distiller(net(4), net(32))(given)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, dtype=torch.long), "do not fit"),
        (torch.tensor([0, 1, 3]), "no class for.*found: 0 to 3.*expected: 0 to 2"),
        (torch.tensor([0, 1, -1]), "no class for"),
        ([0, 1, 2], "are a tensor"),
        (torch.zeros(3, 4), "do not fit"),
        (torch.zeros(3, dtype=torch.long, device="meta"), "another device"),
    ],
)
def test_targets_that_do_not_fit(targets: Any, message: str) -> None:
    with pytest.raises(tt.InputError, match=message):
        tt.Distiller(net(4), net(32))(torch.zeros(3, 8), targets)


def test_a_teacher_that_does_not_fit() -> None:
    x, y = batch()
    with pytest.raises(tt.ModelError, match=r"teacher: its outputs do not fit.*\[16, 5\].*\[16, 3\]"):
        tt.Distiller(net(4), net(32, 5))(x, y)
    off = tt.Distiller(net(4), net(32, 5), alpha=0, hints={"1": "1"}, example_inputs=x)(x, y)
    assert set(off.parts) == {"hard", "1"}
    student = net(4)
    with pytest.raises(tt.ModelError, match="same object"):
        tt.Distiller(student, student)
    with pytest.raises(tt.ModelError, match="same object"):
        tt.Distiller(student, nn.DataParallel(student))
    with pytest.raises(tt.ModelError, match=r"share parameters.*0\.weight"):
        tt.Distiller(student, nn.Sequential(*student))
    view = net(4)
    view[0].weight = nn.Parameter(student[0].weight.data)
    with pytest.raises(tt.ModelError, match="share parameters"):
        tt.Distiller(student, view)
    with pytest.raises(tt.ModelError, match="meta"):
        tt.Distiller(student, net(4).to("meta"))


def test_a_teacher_of_nan() -> None:
    teacher = net(32)
    with torch.no_grad():
        teacher[3].bias[0] = float("nan")
    with pytest.raises(tt.ModelError, match="teacher: it answers with NaN"):
        tt.Distiller(net(4), teacher)(batch()[0])


def test_a_teacher_on_another_device() -> None:
    student, teacher = net(4), net(32)
    distiller = tt.Distiller(student, teacher)
    student.to("meta")
    with pytest.raises(tt.ModelError, match=r"another device.*cpu.*meta"):
        distiller(batch()[0])
    with pytest.raises(tt.ModelError, match="another device"):
        tt.Distiller(student, teacher)


def test_a_criterion_with_weights_moves_and_is_not_saved() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    distiller = tt.Distiller(net(4), net(32), criterion=criterion)
    x, y = batch()
    assert torch.allclose(distiller(x, y).parts["hard"], criterion(distiller.student(x), y))
    assert all(name.startswith("student.") for name in distiller.state_dict())


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "distillation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 7
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "distillation.md", "exec"), names)
    assert (tmp_path / "teacher.safetensors").is_file() and (tmp_path / "student.trim").is_file()


def test_the_benchmark_measures_all_ways() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    distil_overhead = importlib.import_module("distil_overhead")
    found = distil_overhead.measured(("resnet18", "resnet18"), torch.device("cpu"), 2, 32, 2)
    assert set(found) == {distil_overhead.PLAIN, "soft targets by hand", "tt.Distiller", "tt.Distiller, three hints"}
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())


def test_batches_without_any_label_have_no_hard_loss() -> None:
    (x, y), teacher = batch(), net(16)
    student = net(4)
    distiller = tt.Distiller(student, teacher)
    nothing = distiller(x, torch.full_like(y, -100))
    assert nothing.parts["hard"] == 0 and torch.equal(nothing.loss, distiller(x).loss)
    nothing.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    y[::2] = -100
    for smoothing in (0.0, 0.1):
        part = tt.Distiller(student, teacher, label_smoothing=smoothing)(x, y).parts["hard"]
        assert torch.allclose(part, F.cross_entropy(student(x), y, label_smoothing=smoothing))


def test_yes_or_no_is_no_other_number() -> None:
    x, _ = batch()
    distiller = tt.Distiller(net(4), net(16), task="labels")
    for wrong in (5.0, -1.0, float("nan")):
        with pytest.raises(tt.InputError, match="yes or no"):
            distiller(x, torch.full((16, 3), wrong))
    known = torch.ones(16, 3, dtype=torch.bool)
    known[0] = False
    targets = torch.where(known, 1.0, -1.0)
    expected = F.binary_cross_entropy_with_logits(distiller.student(x)[1:], targets[1:])
    assert torch.allclose(distiller(x, targets, mask=known).parts["hard"], expected)


def test_a_teacher_that_writes_to_its_inputs() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scales = net(4), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.mul_(0.5) if self.scales else x)

    student, teacher = Scales(), Scales()
    x, y = batch()
    kept = x.clone()
    distiller = tt.Distiller(student, teacher, hints=["inner.0"], example_inputs=x)
    assert torch.equal(x, kept)
    for _ in range(2):
        assert torch.equal(distiller(x.clone(), y).output, student(x.clone()))
    teacher.scales = False
    late = tt.Distiller(student, teacher)
    late(x.clone())
    teacher.scales = True
    with pytest.raises(tt.ModelError, match="writes to its inputs"):
        late(x.clone())


def test_distances_do_not_depend_on_where_the_samples_lie() -> None:
    a, b = torch.randn(16, 64), torch.randn(16, 64)
    assert torch.allclose(distance_loss(a + 1000, b), distance_loss(a, b), rtol=1e-3)
    lengths = [torch.cdist(each, each) for each in (a, b)]
    by_hand = F.smooth_l1_loss(*(each / each[each > 0].mean() for each in lengths))
    assert torch.allclose(distance_loss(a, b), by_hand, rtol=1e-4)


def test_a_copy_in_the_type_that_it_has_is_moved_alone() -> None:
    teacher = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    distiller = tt.Distiller(net(4), teacher, teacher_dtype=torch.float32)
    assert distiller.teacher[0].weight.data_ptr() == teacher[0].weight.data_ptr()  # type: ignore[index]
    distiller.teacher.double()  # as a move to a device does: the parameters stay the same objects
    assert {tensor.dtype for tensor in teacher.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
