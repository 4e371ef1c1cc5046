"""What a step of the losses must cost: floating-point operations, and bytes sent over ranks.

Shapes: N pairs over all ranks, c columns on a rank, D feature dims, W ranks.
"""

from loss_bench.points import Comparison, Kind, Mode

_NUM_PRODUCTS: dict[tuple[Kind, Mode], int] = {
    ("softmax", "full"): 4,
    ("softmax", "forward"): 1,
    ("sigmoid", "full"): 3,
    ("sigmoid", "forward"): 1,
}


def step_flop(kind: Kind, comparison: Comparison) -> float:
    """Of all ranks together, a multiply-add being two: what the work needs, whatever an implementation does."""
    return _NUM_PRODUCTS[kind, comparison.mode] * 2.0 * comparison.batch**2 * comparison.dim


def sent_bytes(
    kind: Kind,
    schedule: str,
    num_ranks: int,
    columns: int,
    dim: int,
    feature_bytes: int,
    mode: Mode,
    *,
    views: int = 1,
    has_ids: bool = False,
    positives: bool = False,
) -> float:
    """What a rank of scaleclip_kernels sends in one step, all of x, y, scale and bias wanting gradients.

    `columns` are a rank's own (the same on all ranks), `feature_bytes` an element's in the compute dtype, `positives` says
    that duplicates="positive".
    """
    if num_ranks == 1:
        return 0.0
    # features, validity, ids; then what is added to on the way: column statistics, or the columns' gradients
    fixed = dim * feature_bytes + 1 + 8 * has_ids
    statistics, gradient = 4 * (4 if positives else 2), 4 * dim
    terms = 4 * (2 if positives else 1)
    tours = {
        ("softmax", "forward"): [(fixed, statistics)],
        ("softmax", "full"): [(fixed, statistics), (fixed + terms, gradient)],
        ("sigmoid", "forward"): [(fixed, 0)],
        ("sigmoid", "full"): [(fixed, gradient)],
    }[kind, mode]
    # Around a ring, what is carried must also come home: one hop more.
    homeward = num_ranks if schedule == "ring" else num_ranks - 1
    a_column = sum((num_ranks - 1) * there + homeward * back for there, back in tours)
    # the softmax's sums and counts in fp32; the sigmoid's counts in int64 and its sum in fp64
    totals = 8 * views if kind == "softmax" else 8 * views + 8
    return columns * a_column + 2 * (num_ranks - 1) / num_ranks * totals
