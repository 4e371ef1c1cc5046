"""A local SLURM cluster for the tests of this folder, apart from any that runs already."""

from collections.abc import Iterator

import pytest

from slurm_cluster import NODES, Cluster, need_slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An idle cluster of NODES."""
    need_slurm()
    found = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", port=16900)
    found.control("start", str(len(NODES)))
    yield found
    found.control("stop")
