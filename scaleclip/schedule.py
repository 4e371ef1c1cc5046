"""Schedules as pure functions of the step."""

import math

from scaleclip.config import OptimConfig, TrainConfig


def learning_rate(step: int, optim: OptimConfig, train: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (the first is 0): a linear warm-up from zero, then half a cosine to `final_lr`."""
    warmup = math.ceil(optim.warmup_samples / train.global_batch)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, train.steps - warmup)
    return optim.final_lr + (optim.lr - optim.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
