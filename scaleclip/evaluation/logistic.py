"""Multinomial logistic regression by L-BFGS over blocks of features, on all ranks.

The objective is scikit-learn's, the sum of cross-entropies and strength / 2 x |weights|^2 (strength = 1 / C), with a free
intercept; so are the solver, scipy's L-BFGS-B, and where it stops. scikit-learn itself holds all features and two arrays of
N x C on one machine, 4 x (D + 2 C) bytes a row in fp32: 14 GB for ImageNet at D = 768. Here a rank holds one part of the
features at a time, and does its share of the arithmetic on its own device, in fp64: rounding would turn a long search into
another one, and the GPUs of clusters multiply it as fast as fp32. (With two classes scikit-learn fits one vector of
weights; here they are two, which is half its strength.)

Shapes: N rows, B rows of a part, D width, C classes; weights are C x (D + 1), the intercept last.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from scaleclip.distributed import all_or_none, gather_objects
from scaleclip.errors import ConfigError, RunError
from scaleclip.evaluation.features import Features, rows_of

MOST_ITERATIONS = 1000
# scikit-learn's: the largest element of the gradient, and the relative decrease, at which the solver stops
_TOLERANCE, _STALLED = 1e-4, 64 * float(np.finfo(float).eps)
_LINE_SEARCH = 50
_BITS = 61  # of a signed integer of 64, with room for rounding


class Rows(NamedTuple):
    """Some images of a data set."""

    features: Features
    chosen_N: Tensor
    """bool: which."""

    def part(self, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Chosen features of a part with a one behind each, fp64 (B, D + 1), and labels (B,)."""
        feature_BD, label_B = self.features.part(number)
        chosen_B = self.chosen_N[rows_of(number)]
        return pad(feature_BD[chosen_B].to(device).double(), (0, 1), value=1.0), label_B[chosen_B].to(device)


class Fit(NamedTuple):
    """A classifier."""

    weight_CD: Tensor
    """fp64, the intercept in the last column, on the device that it was fitted on."""
    converged: bool
    """Whether the solver reached its tolerance within 1000 iterations; if not, this is as far as it came."""


def fit(rows: Sequence[Rows], num_classes: int, strength: float, device: torch.device) -> Fit:
    """The minimum, searched from zero. All ranks call and get the same, bit for bit for any number of ranks.

    Memory of a rank: a part of the features and three arrays of B x C, and 5 (rank 0: 30) times the weights in fp64.

    Raises:
        ConfigError: scipy is not installed.
        RunError: features cannot be read or are not finite, here or on another rank.
    """
    with all_or_none():
        minimize = _minimize()
    objective = _Objective(rows, num_classes, strength, device)
    if dist.is_initialized() and dist.get_rank() > 0:
        return objective.serve()
    options = {"maxiter": MOST_ITERATIONS, "maxls": _LINE_SEARCH, "gtol": _TOLERANCE, "ftol": _STALLED}
    start = np.zeros(num_classes * objective.width)
    found = minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
    return objective.finish(found.x, converged=found.status == 0)


class _Objective:
    """The mean objective and its gradient. Rank 0 asks; the others `serve` until it is done.

    One search and not one a rank: a rank whose processor rounds otherwise could stop earlier, and the others would wait for it.
    """

    def __init__(self, rows: Sequence[Rows], num_classes: int, strength: float, device: torch.device) -> None:
        self._num_classes, self._strength, self._device = num_classes, strength, device
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        parts = [(each, number) for each in rows for number in range(len(each.features.parts))]
        self._num_parts, self._mine = len(parts), list(enumerate(parts))[rank::world_size]
        self._num_rows = sum(int(each.chosen_N.sum()) for each in rows)
        with all_or_none():
            largest, self.width = 1.0, 0
            for _, (each, number) in self._mine:
                feature_BD, _ = each.part(number, device)
                self.width = feature_BD.shape[1]
                if not feature_BD.isfinite().all():
                    raise RunError("features are not finite: the model is broken")
                largest = max(largest, float(feature_BD.abs().amax()) if len(feature_BD) else 0.0)
        largest, self.width = (max(each) for each in zip(*gather_objects((largest, self.width)), strict=True))
        # no element of the summed gradient exceeds rows x the largest feature
        self._unit = 2.0 ** (_BITS - math.ceil(math.log2(self._num_rows * largest)))

    def __call__(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Rank 0's question; `weights` and the gradient are flat."""
        self._tell(weights, going_on=True)
        return self._evaluate(weights)

    def serve(self) -> Fit:
        """Answer rank 0 until its search ends."""
        while True:
            weights, going_on, converged = self._hear()
            if not going_on:
                return self._fit(weights, converged)
            self._evaluate(weights)

    def finish(self, weights: NDArray[np.float64], converged: bool) -> Fit:
        """End the search of all ranks with its result."""
        self._tell(weights, going_on=False, converged=converged)
        return self._fit(weights, converged)

    def _evaluate(self, weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        shape = (self._num_classes, self.width)
        weight_CD = torch.from_numpy(weights).view(shape).to(self._device)
        loss_of_part = torch.zeros(self._num_parts, dtype=torch.float64)
        # a sum of integers is the same in any order, so for any number of ranks
        gradient_CD = torch.zeros(shape, dtype=torch.int64, device=self._device)
        with all_or_none():
            for index, (rows, number) in self._mine:
                feature_BD, label_B = rows.part(number, self._device)
                log_share_BC, label_B1 = (feature_BD @ weight_CD.T).log_softmax(dim=1), label_B[:, None]
                loss_of_part[index] = -log_share_BC.gather(1, label_B1).sum()
                error_BC = log_share_BC.exp_()
                error_BC.scatter_add_(1, label_B1, error_BC.new_full(label_B1.shape, -1.0))
                gradient_CD += (error_BC.T @ feature_BD * self._unit).round_().long()
        total_CD = gradient_CD.cpu()
        if dist.is_initialized():
            dist.all_reduce(loss_of_part)
            dist.all_reduce(total_CD)
        gradient = (total_CD.double() / self._unit).numpy()
        penalised = weights.reshape(shape).copy()
        penalised[:, -1] = 0
        value = float(loss_of_part.sum()) + self._strength / 2 * float(np.square(penalised).sum())
        return value / self._num_rows, (gradient + self._strength * penalised).ravel() / self._num_rows

    def _tell(self, weights: NDArray[np.float64], *, going_on: bool, converged: bool = False) -> None:
        if dist.is_initialized():
            dist.broadcast(torch.from_numpy(np.concatenate([weights, [going_on, converged]])), src=0)

    def _hear(self) -> tuple[NDArray[np.float64], bool, bool]:
        told = torch.empty(self._num_classes * self.width + 2, dtype=torch.float64)
        dist.broadcast(told, src=0)
        *_, going_on, converged = told[-2:].tolist()
        return told[:-2].numpy(), bool(going_on), bool(converged)

    def _fit(self, weights: NDArray[np.float64], converged: bool) -> Fit:
        return Fit(torch.from_numpy(weights).view(self._num_classes, self.width).to(self._device), converged)


def _minimize() -> Callable[..., Any]:
    try:
        # beside scikit-learn in the `eval` extra
        from scipy.optimize import minimize
    except ModuleNotFoundError:
        raise ConfigError("the linear probe needs scipy, which is not installed: pip install 'scaleclip[eval]'") from None
    found: Callable[..., Any] = minimize
    return found
