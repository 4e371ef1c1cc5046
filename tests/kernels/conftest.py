"""What every kernel test runs under."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# formulas that the tools share with the tests
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty and its kin with NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
