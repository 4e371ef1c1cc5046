"""What a call of a loss was given, checked and brought into one form.

Shapes: N pairs (a rank's own slice where a group is given), V views, M columns, D feature dims.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from scaleclip_kernels import panels, reference
from scaleclip_kernels.blocks import Block, Fp32Precision, Side
from scaleclip_kernels.channels import Channels, channels_over
from scaleclip_kernels.distributed import Layout, Piece, Schedule, ScheduleName, make_schedule, say_once

Duplicates = Literal["negative", "ignore", "positive"]
Backend = Literal["auto", "triton", "panels", "reference"]

_CHOICES = {"duplicates": Duplicates, "fp32_precision": Fp32Precision, "schedule": ScheduleName, "backend": Backend}

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """The keyword arguments that the losses share; the public functions say what they mean."""

    valid: Tensor | None
    column_valid: Tensor | None
    ids: Tensor | None
    column_ids: Tensor | None
    duplicates: Duplicates
    views: int
    compute_dtype: torch.dtype | None
    fp32_precision: Fp32Precision
    group: ProcessGroup | None
    sizes: Sequence[int] | None
    schedule: ScheduleName
    backend: Backend


@dataclass(frozen=True)
class Pairs:
    """What is known of the rows and columns. No mask: all are valid; no ids: they play no part."""

    num_rows: int
    views: int
    extras: int
    """Columns after those of the only view, which no row matches."""
    valid: Tensor | None
    """bool [N]"""
    column_valid: Tensor | None
    """bool [M]"""
    ids: Tensor | None
    """int64 [N]"""
    column_ids: Tensor | None
    """int64 [M]"""
    duplicates: Duplicates

    def view_slices(self) -> list[slice]:
        """Each view's columns that match a row, in the rows' order."""
        return [slice(view * self.num_rows, (view + 1) * self.num_rows) for view in range(self.views)]

    def matched_valid(self, device: torch.device) -> Tensor:
        """bool [V, N]: pairs of which both sides are valid, the ones that a loss averages over."""
        valid_VN = torch.ones(self.views, self.num_rows, dtype=torch.bool, device=device)
        if self.valid is not None:
            valid_VN &= self.valid
        if self.column_valid is not None:
            valid_VN &= self.column_valid[: valid_VN.numel()].view_as(valid_VN)
        return valid_VN


@dataclass(frozen=True)
class Call:
    """Everything about one evaluation of a loss but its differentiable inputs."""

    pairs: Pairs
    compute_dtype: torch.dtype
    fp32_precision: Fp32Precision
    backend: ModuleType
    schedule: Schedule
    channels: Channels | None

    @property
    def num_ranks(self) -> int:
        return self.schedule.num_ranks

    def shared_fate(self) -> contextlib.AbstractContextManager[None]:
        """An error inside ends the call on every rank (see `distributed.Channels.shared_fate`)."""
        return contextlib.nullcontext() if self.channels is None else self.channels.shared_fate()

    def rows(self, x_ND: Tensor) -> Side:
        """x in the compute dtype, zero where invalid: what is invalid may hold NaN."""
        return _side(x_ND.to(self.compute_dtype), self.pairs.valid, self.pairs.ids)

    def columns(self, y_MD: Tensor) -> Side:
        """y likewise. Over ranks validity always travels: one rank may have padding where another has none."""
        valid = self.pairs.column_valid
        if valid is None and self.num_ranks > 1:
            valid = torch.ones(len(y_MD), dtype=torch.bool, device=y_MD.device)
        return _side(y_MD.to(self.compute_dtype), valid, self.pairs.column_ids)

    def block(self, rows: Side, columns: Sequence[Tensor | None], piece: Piece) -> Block:
        """This rank's rows against a piece of the columns (features, invalid, ids) that are here now."""
        features, invalid, ids = columns
        assert features is not None, "columns have features"
        return Block(
            rows,
            Side(features, invalid, ids).part(piece.columns),
            piece.matched,
            self.pairs.duplicates == "positive",
            self.fp32_precision,
        )


def prepare(
    x_ND: Tensor,
    y_MD: Tensor,
    options: Options,
    *,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Call:
    """Check everything; looks at shapes, dtypes and devices only, never at values. All ranks of the group call.

    Raises:
        ValueError: what a caller can get wrong, named; over ranks also that they do not make the same call.
        RankError: another rank of the group failed.
    """
    channels = channels_over(options.group, x_ND.device)
    with contextlib.nullcontext() if channels is None else channels.shared_fate():
        for name, allowed in _CHOICES.items():
            if getattr(options, name) not in get_args(allowed):
                raise ValueError(f"{name}={getattr(options, name)!r} is not one of {', '.join(get_args(allowed))}")
        if not isinstance(options.views, int):
            raise ValueError(f"views={options.views!r} must be a whole number")
        if (
            not isinstance(weights, (tuple, list))
            or len(weights) != 2
            or not all(0 <= weight < math.inf for weight in weights)
            or max(weights) == 0
        ):
            raise ValueError(f"weights={weights} must be two finite numbers (x to y, y to x), none below 0 and not both 0")
        pairs = _pairs(x_ND, y_MD, options)
        _check_scalar("logit_scale", logit_scale, x_ND)
        if logit_bias is not None:
            _check_scalar("logit_bias", logit_bias, x_ND)
        compute_dtype = _compute_dtype(x_ND, y_MD, options)
        layout = _layout(pairs, options.sizes, channels)
        if channels is not None:
            wanted = [torch.is_grad_enabled() and side.requires_grad for side in (x_ND, y_MD)]
            channels.agree(
                f"sizes={list(layout.sizes)} extras={layout.extras} D={x_ND.shape[1]} compute_dtype={compute_dtype} "
                f"fp32_precision={options.fp32_precision} "
                f"views={options.views} duplicates={options.duplicates} weights={tuple(weights)} schedule={options.schedule} "
                f"gradients={wanted} bias={logit_bias is not None}"
            )
        schedule = make_schedule(options.schedule, layout, channels)
        return Call(
            pairs,
            compute_dtype,
            options.fp32_precision,
            _backend(options.backend, options.fp32_precision, x_ND.device, schedule.num_ranks),
            schedule,
            channels,
        )


def _pairs(x_ND: Tensor, y_MD: Tensor, options: Options) -> Pairs:
    if x_ND.ndim != 2 or y_MD.ndim != 2 or x_ND.shape[1] != y_MD.shape[1]:
        raise ValueError(f"x and y must be (N, D) and (M, D) with one D, got {tuple(x_ND.shape)} and {tuple(y_MD.shape)}")
    views, num_rows, num_columns = options.views, len(x_ND), len(y_MD)
    extras = num_columns - views * num_rows
    if views < 1 or extras < 0:
        raise ValueError(
            f"y has {num_columns} columns for {num_rows} pairs in views={views}: pair i of view v is column v * N + i, "
            "so views must be at least 1 and y needs views * N columns"
        )
    if views > 1 and extras:
        raise ValueError(
            f"y has {num_columns} columns, {extras} more than views={views} of {num_rows} pairs: that needs views=1"
        )
    for name, dtype, length in (
        ("valid", torch.bool, num_rows),
        ("column_valid", torch.bool, num_columns),
        ("ids", torch.int64, num_rows),
        ("column_ids", torch.int64, num_columns),
    ):
        tensor = getattr(options, name)
        if tensor is None:
            continue
        if tensor.shape != (length,) or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} of shape ({length},), got {tensor.dtype} of shape {tuple(tensor.shape)}")
        _check_device(name, tensor, x_ND)
    _check_device("y", y_MD, x_ND)

    column_valid = options.column_valid
    if column_valid is None and options.valid is not None:
        column_valid = torch.cat([options.valid.repeat(views), options.valid.new_ones(extras)])
    if options.duplicates == "negative":
        return Pairs(num_rows, views, extras, options.valid, column_valid, None, None, options.duplicates)
    if options.ids is None:
        raise ValueError(f"duplicates={options.duplicates!r} needs ids: pass ids of shape (N,), or duplicates='negative'")
    if extras and options.column_ids is None:
        raise ValueError(
            f"duplicates={options.duplicates!r} with {extras} extra columns needs column_ids of shape (M,): say what the extra "
            "columns show, or give each an id of its own"
        )
    column_ids = options.ids.repeat(views) if options.column_ids is None else options.column_ids
    return Pairs(num_rows, views, extras, options.valid, column_valid, options.ids, column_ids, options.duplicates)


def _check_scalar(name: str, value: Tensor, x_ND: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}={value!r} must be a tensor of shape () or (1,): torch.tensor({value!r})")
    if value.shape not in ((), (1,)):
        raise ValueError(f"{name} must have shape () or (1,), got {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64):
        why = ": in bf16, 98.5 and 98.9 are one number" if value.is_floating_point() else ""
        raise ValueError(f"{name} must be fp32, got {value.dtype}{why}")
    _check_device(name, value, x_ND)


def _check_device(name: str, tensor: Tensor, x_ND: Tensor) -> None:
    if tensor.device != x_ND.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x_ND.device}: move them to one device")


def _compute_dtype(x_ND: Tensor, y_MD: Tensor, options: Options) -> torch.dtype:
    if x_ND.dtype != y_MD.dtype or not x_ND.is_floating_point():
        raise ValueError(f"x and y must share a floating-point dtype, got {x_ND.dtype} and {y_MD.dtype}: cast one of them")
    dtype = x_ND.dtype if options.compute_dtype is None else options.compute_dtype
    if options.backend == "reference" and dtype == torch.float64:
        return dtype
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"backend={options.backend!r} computes in fp32, bf16 or fp16, not {dtype}: cast the features or set compute_dtype "
            "(fp64 works with backend='reference')"
        )
    if x_ND.dtype not in (torch.float32, dtype):
        raise ValueError(f"compute_dtype={dtype} takes features in fp32 or {dtype}, got {x_ND.dtype}: cast the features")
    return dtype


def _layout(pairs: Pairs, sizes: Sequence[int] | None, channels: Channels | None) -> Layout:
    num_ranks, rank = (1, 0) if channels is None else (channels.num_ranks, channels.rank)
    sizes = (pairs.num_rows,) * num_ranks if sizes is None else tuple(sizes)
    if len(sizes) != num_ranks or sizes[rank] != pairs.num_rows:
        raise ValueError(
            f"sizes={list(sizes)} must name the pairs of each of {num_ranks} ranks, and rank {rank} has {pairs.num_rows}"
        )
    return Layout(sizes, pairs.views, pairs.extras)


def _backend(name: Backend, precision: Fp32Precision, device: torch.device, num_ranks: int) -> ModuleType:
    if name == "auto":
        name = "triton" if device.type == "cuda" else "panels"
        say_once(f"backend {name} on {device.type}")
    if name == "reference" and num_ranks > 1:
        raise ValueError(
            f"backend='reference' cannot run over {num_ranks} ranks: it stores the whole matrix in one process; choose 'auto'"
        )
    if precision != "ieee" and name != "triton":
        raise ValueError(f"fp32_precision={precision!r} is for tensor cores: backend={name!r} on {device} has only 'ieee'")
    if precision == "tf32x3" and torch.version.hip is not None:
        raise ValueError("fp32_precision='tf32x3': Triton has no such products for AMD GPUs; choose 'ieee'")
    return _triton_backend(device) if name == "triton" else {"reference": reference, "panels": panels}[name]


def _triton_backend(device: torch.device) -> ModuleType:
    try:  # here, so that the package can be imported without triton
        from scaleclip_kernels import triton_backend
    except ImportError as error:
        raise ValueError(
            f"backend='triton' cannot run: triton cannot be imported ({error}); install it, or choose backend='panels'"
        ) from error
    if device.type != "cuda" and not triton_backend.IS_INTERPRETED:
        raise ValueError(
            f"backend='triton' cannot run on {device}: it needs a CUDA or ROCm device; choose 'auto' or 'panels' "
            "(TRITON_INTERPRET=1 in the environment runs its kernels in an interpreter, for tests)"
        )
    return triton_backend


def _side(features: Tensor, valid: Tensor | None, ids: Tensor | None) -> Side:
    ids = None if ids is None else ids.contiguous()
    if valid is None:
        return Side(features.contiguous(), None, ids)
    # masked_fill, not a product: 0 * NaN would reach every gradient
    return Side(features.masked_fill(~valid.unsqueeze(1), 0).contiguous(), ~valid, ids)
