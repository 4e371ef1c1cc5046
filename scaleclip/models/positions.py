"""Tables of position embeddings: fixed ones, and how a table changes its size between stages of a training.

Dimensions: N positions, D the tower's width, H W rows and columns of the patch grid, P tokens in front of the patches.
"""

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TABLE = re.compile(r"(image|text)\.body\.(?:.+\.)?(?:position_embeddings?|pos_embed|embed_positions)(?:\.weight)?")

# of a value of a fixed table, which is in [-1, 1]: what sine and cosine of other machines and bf16 in a folder may add
_FIXED_TOLERANCE = 1e-2


def resize_positions(name: str, table: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A position table of one stage as the next stage, with another image size or text length, needs it.

    Image tables ([N, D] or [1, N, D], rows of a square grid behind at most one class token): the class token's row is kept,
    the grid is resized by antialiased bicubic interpolation. Text tables ([N, D]): cut to the first rows, or stretched by
    linear interpolation from the first to the last row; rows of RoBERTa in front of its first position are kept. Fixed
    sine-cosine tables, known by their values, are made anew in both.

    Args:
        name: the parameter's name in a DualEncoder, such as `image.body.vision_model.embeddings.position_embedding.weight`.
        table: the whole old parameter, or a moment of it; any floating dtype. Bicubic interpolation may overshoot: a second
            moment has to be clamped at 0.
        shape: of the new parameter.

    Returns:
        The new table, in the dtype and on the device of the old one; None where `name` is no table of positions, or where the
        two shapes differ in more than the number of positions.
    """
    match, shape = _TABLE.fullmatch(name), tuple(shape)
    same_but_number = table.dim() >= 2 and table.shape[:-2] + table.shape[-1:] == shape[:-2] + shape[-1:]
    if not match or not same_but_number or table.shape[:-2].numel() != 1:
        return None
    old_ND = table.reshape(table.shape[-2:])
    new_ND = _resize_grid(old_ND, shape[-2]) if match[1] == "image" else _resize_line(old_ND, shape[-2])
    return None if new_ND is None else new_ND.to(table.dtype).reshape(shape)


def sincos_table(num_positions: int, width: int, num_prefix: int) -> Tensor:
    """Fixed sine-cosine positions of a square patch grid (MoCo v3, arXiv:2104.02057; MAE, arXiv:2111.06377), fp32 [N, D].

    A quarter of a row each: sine and cosine of the column, sine and cosine of the row. The prefix tokens' rows are zero.
    """
    grid = math.isqrt(num_positions - num_prefix)
    steps = torch.arange(grid)
    columns_N, rows_N = steps.repeat(grid), steps.repeat_interleave(grid)
    patches_ND = torch.cat([_sincos(columns_N, width // 2), _sincos(rows_N, width // 2)], dim=1)
    return torch.cat([torch.zeros(num_prefix, width), patches_ND])


def is_fixed(table_ND: Tensor, fixed_ND: Tensor) -> bool:
    """Whether a table is this fixed one, but for rounding."""
    return torch.allclose(table_ND.float(), fixed_ND.to(table_ND.device), rtol=0, atol=_FIXED_TOLERANCE)


def _sincos(positions_N: Tensor, width: int) -> Tensor:
    frequencies = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions_N.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def _resize_grid(old_ND: Tensor, num_positions: int) -> Tensor | None:
    num_prefix = _num_prefix(len(old_ND))
    if num_prefix is None or num_prefix != _num_prefix(num_positions):
        return None
    width = old_ND.shape[1]
    if num_positions == len(old_ND):
        return old_ND
    if width % 4 == 0 and is_fixed(old_ND, sincos_table(len(old_ND), width, num_prefix)):
        return sincos_table(num_positions, width, num_prefix).to(old_ND.device)
    old_grid, new_grid = (math.isqrt(number - num_prefix) for number in (len(old_ND), num_positions))
    old_1DHW = old_ND[num_prefix:].float().T.reshape(1, width, old_grid, old_grid)
    new_1DHW = F.interpolate(old_1DHW, size=(new_grid, new_grid), mode="bicubic", antialias=True)
    return torch.cat([old_ND[:num_prefix].float(), new_1DHW.reshape(width, -1).T])


def _num_prefix(num_positions: int) -> int | None:
    # unambiguous: no two squares above 0 are neighbours
    found = [prefix for prefix in (0, 1) if num_positions > prefix and _is_square(num_positions - prefix)]
    return found[0] if found else None


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _resize_line(old_ND: Tensor, num_positions: int) -> Tensor:
    number, width = old_ND.shape
    if num_positions <= number:
        return old_ND[:num_positions].clone()
    if is_fixed(old_ND, _sincos(torch.arange(number), width)):
        return _sincos(torch.arange(num_positions), width).to(old_ND.device)
    # RoBERTa's positions start behind its padding's, 1, whose row is zero
    first = 2 if number > 2 and not old_ND[1].any() else 0
    old_1DN = old_ND[first:].float().T.unsqueeze(0)
    new_1DN = F.interpolate(old_1DN, size=num_positions - first, mode="linear", align_corners=True)
    return torch.cat([old_ND[:first].float(), new_1DN[0].T])
