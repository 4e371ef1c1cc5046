"""The losses that can be measured. Each is built in the child process, so nothing here imports torch or a peer at once.

Shapes: N pairs on this rank, D feature dims.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loss_bench.points import Comparison, Kind

if TYPE_CHECKING:
    from torch import Tensor

    Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(x_ND, y_ND, logit_scale, logit_bias or None) to a scalar."""

LOCAL = "local_loss+gather_with_grad"


class CannotRun(Exception):
    """The implementation does not work here; the message says why."""


@dataclass(frozen=True)
class Setup:
    """What an implementation is built for."""

    comparison: Comparison
    variant: str
    rank: int


@dataclass(frozen=True)
class Implementation:
    """One loss, ours, a peer's or the user's."""

    kind: Kind
    build: "Callable[[Setup], Loss]"
    variants: Callable[[int, Sequence[str]], Sequence[str]] = lambda world, schedules: ("",)
    """For a number of ranks and the wanted schedules."""
    has_settings: bool = False
    """A peer whose speed depends on torch's flags or its own options: it also runs at those that are not compared."""
    is_ours: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def find(name: str) -> Implementation:
    """By its name, or as `name=module:function[:sigmoid]`.

    Raises:
        ValueError: there is none of this name.
    """
    label, equals, target = name.partition("=")
    if not equals:
        if name not in REGISTRY:
            raise ValueError(
                f"{name!r} is not one of {', '.join(REGISTRY)}; a loss of your own is written name=module:function for "
                "function(x, y, logit_scale), or name=module:function:sigmoid for function(x, y, logit_scale, logit_bias)"
            )
        return REGISTRY[name]
    module, _, rest = target.partition(":")
    function, _, kind = rest.partition(":")
    if not label or label in REGISTRY or not module or not function or kind not in ("", "softmax", "sigmoid"):
        raise ValueError(
            f"{name!r} must be name=module:function or name=module:function:sigmoid, with a name of its own "
            f"(taken: {', '.join(REGISTRY)})"
        )
    return Implementation("sigmoid" if kind == "sigmoid" else "softmax", lambda setup: _own(module, function, kind))


def feature_gradient_factor(name: str, setup: Setup) -> float:
    """By what a rank's feature gradients differ from the global mean's: W where the trainer's mean over ranks divides by W."""
    # Without gather_with_grad, open_clip leaves the mean over ranks at 1 / W of the true gradient.
    is_unscaled = name == "open_clip" and setup.variant != LOCAL
    return 1.0 if is_unscaled else float(setup.comparison.world)


def remark(name: str, setup: Setup) -> str:
    """What a reader must know of a row."""
    if setup.comparison.world > 1 and feature_gradient_factor(name, setup) == 1.0:
        return "its mean over ranks is 1/W of the true feature gradient"
    return ""


def _own(module: str, function: str, kind: str) -> "Loss":
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise CannotRun(f"{module}:{function} cannot be imported: {error}") from error
    return found if kind == "sigmoid" else lambda x, y, scale, bias: found(x, y, scale)


def _ours(kind: Kind, backend: str) -> "Callable[[Setup], Loss]":
    def build(setup: Setup) -> "Loss":
        import torch.distributed as dist

        from scaleclip_kernels import sigmoid_contrastive_loss, softmax_contrastive_loss

        options: dict[str, Any] = {"backend": backend}
        if setup.comparison.world > 1:
            options |= {"group": dist.group.WORLD, "schedule": setup.variant}
        if kind == "sigmoid":
            return lambda x, y, scale, bias: sigmoid_contrastive_loss(x, y, scale, bias, **options)
        return lambda x, y, scale, bias: softmax_contrastive_loss(x, y, scale, **options)

    return build


def _our_schedules(world: int, schedules: Sequence[str]) -> Sequence[str]:
    return ("",) if world == 1 else schedules


def _open_clip(setup: Setup) -> "Loss":
    loss_module = _import("open_clip.loss", "pip install open_clip_torch")
    local = setup.variant == LOCAL
    loss = loss_module.ClipLoss(
        local_loss=local,
        gather_with_grad=local,
        # as its trainer does
        cache_labels=True,
        rank=setup.rank,
        world_size=setup.comparison.world,
    )
    return lambda x, y, scale, bias: _autocast(setup, lambda: loss(x, y, scale))


def _open_clip_siglip(setup: Setup) -> "Loss":
    loss_module = _import("open_clip.loss", "pip install open_clip_torch")
    loss = loss_module.SigLipLoss(rank=setup.rank, world_size=setup.comparison.world, dist_impl=setup.variant or None)
    return lambda x, y, scale, bias: _autocast(setup, lambda: loss(x, y, scale, bias))


def _inf_cl(setup: Setup) -> "Loss":
    import torch

    if setup.comparison.device != "cuda" or not torch.cuda.is_available():
        raise CannotRun("inf_cl's Triton kernels need a CUDA device: run with --device cuda on a GPU")
    module = _import("inf_cl", "pip install inf-cl")
    # Other head dims give wrong results: its kernels use the next power of two as the stride.
    head_dim = next((size for size in (256, 128, 64, 32, 16) if setup.comparison.dim % size == 0), None)
    if head_dim is None:
        raise CannotRun(f"inf_cl needs a dim that is a multiple of 16, not {setup.comparison.dim}")
    if not torch.distributed.is_initialized():
        # it asks for its rank even where there is one
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    one_way = module.cal_inf_loss
    return lambda x, y, scale, bias: (
        (one_way(x, y, scale=scale, head_dim=head_dim) + one_way(y, x, scale=scale, head_dim=head_dim)) / 2
    )


def _autocast(setup: Setup, call: "Callable[[], Tensor]") -> "Tensor":
    """As open_clip's trainer runs its loss: under autocast in 16 bits (--precision amp_bf16, amp), as it is in fp32."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.comparison.dtype)
    with torch.autocast(setup.comparison.device, dtype=dtype, enabled=dtype is not None):
        return call()


def _import(module: str, command: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRun(f"{module} is not installed ({command}): {error}") from error


def _cpu_library(name: str) -> dict[str, str]:
    return {"SCALECLIP_KERNELS_CPU_GEMM": name}


REGISTRY = {
    "panels": Implementation(
        "softmax", _ours("softmax", "panels"), _our_schedules, is_ours=True, environment=_cpu_library("auto")
    ),
    "panels_default_gemm": Implementation(
        "softmax", _ours("softmax", "panels"), _our_schedules, is_ours=True, environment=_cpu_library("default")
    ),
    "triton": Implementation("softmax", _ours("softmax", "triton"), _our_schedules, is_ours=True),
    "reference": Implementation(
        "softmax", _ours("softmax", "reference"), lambda world, schedules: ("",) if world == 1 else ("auto",), is_ours=True
    ),
    "panels_siglip": Implementation(
        "sigmoid", _ours("sigmoid", "panels"), _our_schedules, is_ours=True, environment=_cpu_library("auto")
    ),
    "panels_siglip_default_gemm": Implementation(
        "sigmoid", _ours("sigmoid", "panels"), _our_schedules, is_ours=True, environment=_cpu_library("default")
    ),
    "triton_siglip": Implementation("sigmoid", _ours("sigmoid", "triton"), _our_schedules, is_ours=True),
    "open_clip": Implementation(
        "softmax", _open_clip, lambda world, schedules: ("",) if world == 1 else ("default", LOCAL), has_settings=True
    ),
    "inf_cl": Implementation("softmax", _inf_cl),
    "open_clip_siglip": Implementation(
        "sigmoid", _open_clip_siglip, lambda world, schedules: ("",) if world == 1 else ("bidir", "gather"), has_settings=True
    ),
}
