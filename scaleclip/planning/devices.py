"""Accelerators by name, with the figures of their data sheets."""

import difflib
import importlib.resources
from typing import Any, Literal, NamedTuple, cast

import yaml

from scaleclip.errors import ConfigError


class Device(NamedTuple):
    """An accelerator in its maker's server."""

    name: str
    title: str
    bf16_tflops: float
    """Dense peak."""
    fp32_tflops: float
    """Peak without TF32."""
    memory_gib: float
    node_gb_per_s: float
    """To the other devices of the node, in one direction."""
    network_gb_per_s: float
    """Of the network card of one device, in one direction."""
    cpu_cores: float
    """Of the server, for each device."""
    basis: Literal["data sheet", "measured"]
    """Of the peaks."""
    server_basis: Literal["data sheet", "assumed"]
    """Of memory, links and cores."""
    source: str


def device_names() -> list[str]:
    """Names that `load_device` takes."""
    return list(_read())


def load_device(name: str) -> Device:
    """The accelerator of this name; raises ConfigError for an unknown one."""
    devices = _read()
    if name not in devices:
        close = difflib.get_close_matches(name, devices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"--gpu={name!r} is unknown{hint}; devices: {', '.join(devices)}")
    return Device(name, **devices[name])


def _read() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("scaleclip.planning").joinpath("devices.yaml").read_text()
    return cast(dict[str, dict[str, Any]], yaml.safe_load(text))
