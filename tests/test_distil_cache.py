"""A teacher's outputs, kept: never those of another sample, and written whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import torchtrim as tt


class Counted(nn.Module):
    """Counts the rows it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.rows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return self.linear(x)


def pair() -> tuple[nn.Module, Counted]:
    return nn.Linear(4, 3), Counted()


def test_the_teacher_is_asked_once_for_each_sample() -> None:
    student, teacher = pair()
    x = torch.randn(10, 4)
    distiller = tt.Distiller(student, teacher, cache=True)
    first = distiller(x).parts["soft"]
    assert teacher.rows == 10
    assert torch.equal(distiller(x).parts["soft"], first) and teacher.rows == 10
    assert torch.equal(distiller(x.flip(0)).loss, distiller(x).loss) or teacher.rows == 10
    exact = tt.Distiller(student, teacher)(x).parts["soft"]
    assert float(first.detach()) == pytest.approx(float(exact.detach()), rel=1e-2, abs=1e-5)
    teacher.rows = 0
    mixed = torch.cat([x[:4], torch.randn(3, 4), x[8:]])
    rows = torch.cat([distiller(x[row : row + 1]).parts["soft"].reshape(1) for row in (0, 1, 2, 3, 8, 9)])
    assert teacher.rows == 0
    whole = distiller(mixed).parts["soft"]
    assert teacher.rows == 3
    new = torch.cat([distiller(mixed[row : row + 1]).parts["soft"].reshape(1) for row in (4, 5, 6)])
    assert torch.allclose(whole, torch.cat([rows, new]).mean(), rtol=1e-4)
    assert distiller.cache is not None and len(distiller.cache) == 13 and distiller.cache.size_bytes == 13 * 3 * 2


def test_an_augmented_sample_is_another_one() -> None:
    student, teacher = pair()
    distiller = tt.Distiller(student, teacher, cache=True)
    x = torch.randn(5, 4)
    distiller(x)
    moved = x.clone()
    moved[2, 1] += 1e-6 + abs(float(x[2, 1])) * 1e-6
    distiller(moved)
    assert teacher.rows == 6
    distiller(x.double().float().reshape(5, 4))
    assert teacher.rows == 6  # the same bytes


def test_a_sample_twice_in_a_batch() -> None:
    student, teacher = pair()
    distiller = tt.Distiller(student, teacher, cache=True)
    x = torch.randn(1, 4).expand(3, 4)
    expected = tt.Distiller(student, copy.deepcopy(teacher))(x).loss
    assert float(distiller(x).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    assert distiller.cache is not None and len(distiller.cache) == 1


def test_samples_by_number() -> None:
    student, teacher = pair()
    distiller = tt.Distiller(student, teacher, cache=True)
    x = torch.randn(4, 4)
    distiller(x, index=torch.arange(4))
    distiller(x[2:], index=[2, 3])
    assert teacher.rows == 4
    with pytest.raises(tt.InputError, match="leave index out where inputs are augmented"):
        distiller(x[2:] + 1, index=[2, 3])
    for bad in ([0, 1], torch.zeros(4), torch.zeros(4, 1, dtype=torch.long)):
        with pytest.raises(tt.InputError, match="number for each sample"):
            distiller(x, index=bad)


def test_a_file_is_for_one_teacher(tmp_path: Path) -> None:
    student, teacher = pair()
    x, place = torch.randn(6, 4), tmp_path / "teacher.safetensors"
    with tt.Distiller(student, teacher, cache=place) as distiller:
        first = distiller(x).loss
        distiller(x[:2], index=[7, 8])
    rows = teacher.rows
    again = tt.Distiller(student, teacher, cache=str(place))
    assert torch.equal(again(x).loss, first) and teacher.rows == rows
    again(x[:2], index=[7, 8])
    assert teacher.rows == rows
    with pytest.raises(tt.InputError, match="not what it was"):
        again(x[2:4], index=[7, 8])
    with pytest.raises(tt.CheckpointMismatch, match="another teacher"):
        tt.Distiller(student, Counted(), cache=place)(x)
    with pytest.raises(tt.CheckpointMismatch, match="another teacher"):
        tt.Distiller(student, teacher, cache=place, teacher_dtype=torch.bfloat16)(x)
    place.write_bytes(place.read_bytes()[:-5])
    with pytest.raises(tt.CheckpointDamaged, match="cut short"):
        tt.Distiller(student, teacher, cache=place)(x)
    tt.save(student, tmp_path / "model.trim")
    with pytest.raises(tt.CheckpointDamaged, match="not a cache"):
        tt.Distiller(student, teacher, cache=tmp_path / "model.trim")(x)
    with pytest.raises(tt.InputError, match="no file"):
        tt.TeacherCache().save()


def test_a_teacher_that_changes_is_asked_again() -> None:
    student, teacher = pair()
    distiller = tt.Distiller(student, teacher, cache=True)
    x = torch.randn(4, 4)
    before = distiller(x).loss
    with torch.no_grad():
        teacher.linear.weight.mul_(-3)
    assert not torch.allclose(distiller(x).loss, before) and teacher.rows == 8


def test_limits() -> None:
    student, teacher = pair()
    cache = tt.TeacherCache(max_mb=7 * 6 / 2**20)
    distiller = tt.Distiller(student, teacher, cache=cache)
    x = torch.randn(10, 4)
    distiller(x)
    assert len(cache) == 7
    distiller(x)
    assert teacher.rows == 13 and (cache.hits, cache.misses) == (7, 13)
    with torch.no_grad():
        teacher.linear.bias[0] = 1e6  # more than a 16-bit float holds
    fresh = tt.Distiller(student, teacher, cache=True, task="values")
    exact = tt.Distiller(student, teacher, task="values")
    assert torch.equal(fresh(x).parts["soft"], exact(x).parts["soft"]) and fresh.cache is not None
    assert len(fresh.cache) == 0


def test_dense_outputs_and_dicts() -> None:
    student, teacher = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    distiller = tt.Distiller(student, teacher, cache=True)
    x = torch.randn(3, 3, 5, 5)
    first = distiller({"input": x}).loss
    assert torch.equal(distiller({"input": x}).loss, first)
    distiller(torch.randn(2, 3, 6, 6))
    assert distiller.cache is not None and len(distiller.cache) == 5
    assert distiller.cache.size_bytes == 2 * 4 * (3 * 25 + 2 * 36)


def test_a_cache_in_memory_is_for_one_teacher() -> None:
    student, first = pair()
    _, second = pair()
    with torch.no_grad():
        first.linear.weight.mul_(-2)
        second.linear.weight.mul_(3)  # as many writes as the other has seen
    cache, x = tt.TeacherCache(), torch.randn(4, 4)
    for teacher in (first, second, first):
        kept = tt.Distiller(student, teacher, cache=cache)(x).parts["soft"]
        assert torch.allclose(kept, tt.Distiller(student, teacher)(x).parts["soft"], rtol=1e-2)
    asked = first.rows
    assert torch.equal(tt.Distiller(student, first, cache=cache)(x).parts["soft"], kept) and first.rows == asked
    assert len(copy.deepcopy(cache)) == 4


def test_a_cache_knows_which_output_is_meant() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": self.a(x), "b": 5 * self.b(x)}

    student, teacher, cache, x = nn.Linear(4, 3), Two(), tt.TeacherCache(), torch.randn(4, 4)
    for output in ("a", "b"):
        kept = tt.Distiller(student, teacher, cache=cache, teacher_output=output)(x).parts["soft"]
        assert torch.allclose(kept, tt.Distiller(student, teacher, teacher_output=output)(x).parts["soft"], rtol=1e-2)


def test_weights_that_are_other_tensors_are_seen() -> None:
    student, teacher = pair()
    distiller, x = tt.Distiller(student, teacher, cache=True), torch.randn(4, 4)
    before = distiller(x).loss
    other = {name: -3 * value for name, value in teacher.state_dict().items()}
    teacher.load_state_dict(other, assign=True)
    assert not torch.allclose(distiller(x).loss, before)
