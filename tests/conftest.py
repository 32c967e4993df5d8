"""What every test starts from: one thread, a fixed seed, a wide plain terminal."""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.update(COLUMNS="120", NO_COLOR="1", TERM="dumb")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
