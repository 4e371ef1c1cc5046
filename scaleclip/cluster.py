"""What a job asks of a cluster: defaults in slurm/clusters/NAME.yaml, options of the command over them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from scaleclip.config import Section, StringList
from scaleclip.config_io import parse_section
from scaleclip.errors import ConfigError
from scaleclip.files import resolve_path

CLUSTERS = "package:scaleclip/slurm/clusters"


class Cluster(Section):
    """What a job gets; none is the cluster's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes that the job must not get."""
    nodes: int = Field(default=1, ge=1)
    min_nodes: int | None = Field(default=None, ge=1)
    """With which the job starts where not all are free; none: with all only."""
    gpus: int = Field(default=0, ge=0)
    """Of a node."""
    ranks: int | None = Field(default=None, ge=1)
    """Of a node; none: one a GPU."""
    cpus: int = Field(default=1, ge=1)
    """Of a rank."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Of a node."""
    hours: float = Field(default=24.0, gt=0)
    """Time limit, at which the job saves and goes back into the queue under its id."""
    grace_s: int = Field(default=120, ge=10)
    """Seconds between SLURM's warning and the end."""
    setup: StringList = ()
    """Lines of the job's shell before its ranks start."""
    srun: StringList = ()
    """Further options of srun."""

    @property
    def ranks_per_node(self) -> int:
        """Tasks that SLURM starts on a node."""
        return self.ranks or max(self.gpus, 1)


def load_cluster(name: str | None, options: dict[str, Any]) -> Cluster:
    """The cluster's defaults with `options`, those that are None left out, over them. GPUs bring their number of ranks.

    Args:
        name: of a file in slurm/clusters, or a path of one; none for no defaults.
        options: fields of Cluster.

    Raises:
        ConfigError: no such file, an unknown key or a wrong value.
    """
    tree: dict[str, Any] = {}
    if name is not None:
        own = Path(name).suffix in (".yaml", ".yml")
        path = Path(name if own else f"{resolve_path(CLUSTERS)}/{name}.yaml")
        try:
            tree = yaml.safe_load(path.read_text()) or {}
        except OSError:
            known = ", ".join(sorted(file.stem for file in Path(resolve_path(CLUSTERS)).glob("*.yaml")))
            raise ConfigError(f"--cluster={name}: there is no {path}; known are {known}, or give a .yaml file") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"--cluster={name}: {path} is not YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"--cluster={name}: {path} holds a {type(tree).__name__}, not keys with values")
        try:
            parse_section(Cluster, tree)
        except ConfigError as error:
            raise ConfigError(f"--cluster={name}: {path}: {error}") from None
    if options.get("gpus") is not None:
        tree.pop("ranks", None)
    cluster = parse_section(Cluster, tree | {key: value for key, value in options.items() if value is not None})
    if cluster.min_nodes and cluster.min_nodes > cluster.nodes:
        raise ConfigError(f"min_nodes={cluster.min_nodes} is above nodes={cluster.nodes}: lower it, or ask for more nodes")
    return cluster
