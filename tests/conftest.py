"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """No test sees how many random numbers others drew before it."""
    torch.manual_seed(0)
