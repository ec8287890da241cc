"""What holds for every test."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """No test sees how many random numbers others drew before it."""
    torch.manual_seed(0)
    np.random.seed(0)
