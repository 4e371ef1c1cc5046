"""95 % intervals of figures that are means over samples: the percentile bootstrap (Efron, 1979).

Drawing N of N values with replacement and taking their mean needs only how often each distinct value is drawn, which is
multinomial: what is right or wrong costs two counts a draw, however many samples there are.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEVELS = (0.025, 0.975)
# counts held at once: 8 MiB
_BLOCK = 1 << 20


def bootstrap_interval(
    values_N: Tensor, *, groups_N: Tensor | None = None, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """The interval of the mean of `values_N`, or with groups of the mean of the groups' means.

    Args:
        values_N: outcome of each sample, of any real or bool dtype.
        groups_N: int64 group of each sample, such as its class; samples are drawn within their group, so that none is ever
            empty.
        seed: of the draws: the same values give the same interval, on every rank.
        draws: resamples.

    Raises:
        ValueError: there are no values.
    """
    if not len(values_N):
        raise ValueError("an interval needs at least one value")
    values = values_N.double().numpy()
    random = np.random.default_rng(seed)
    if groups_N is None:
        means = _means(values, random, draws)
    else:
        groups = [values[members.numpy()] for members in _members(groups_N)]
        means = sum((_means(group, random, draws) for group in groups), np.zeros(draws)) / len(groups)
    low, high = np.quantile(means, _LEVELS)
    return float(low), float(high)


def _members(groups_N: Tensor) -> tuple[Tensor, ...]:
    """Positions of each group's samples."""
    order = groups_N.argsort(stable=True)
    return torch.split(order, torch.unique(groups_N, return_counts=True)[1].tolist())


def _means(values: NDArray[np.float64], random: np.random.Generator, draws: int) -> NDArray[np.float64]:
    """[draws] mean of as many values drawn with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    block = max(1, _BLOCK // len(distinct))
    shares = counts / counts.sum()
    drawn = [
        random.multinomial(len(values), shares, size=min(block, draws - start)) @ distinct for start in range(0, draws, block)
    ]
    means: NDArray[np.float64] = np.concatenate(drawn) / len(values)
    return means
