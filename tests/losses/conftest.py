"""What SLIP's losses give on ranks, found once for the tests of both."""

from collections.abc import Callable
from functools import cache

import pytest

from scaleclip.local_ranks import run_ranks
from ssl_rank_jobs import SslResult, ssl_on_ranks


@pytest.fixture(scope="session")
def on_ranks() -> Callable[[int], list[SslResult]]:
    """Every rank's result for a number of ranks."""
    return cache(lambda num_ranks: run_ranks(ssl_on_ranks, num_ranks))
