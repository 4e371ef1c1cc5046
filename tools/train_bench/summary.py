"""What the measuring processes answered, as rows of the record."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from loss_bench.summary import About
from train_bench.points import OPEN_CLIP, OURS, PARTS, Answer, Layout, PeerJob, Seconds
from train_bench.records import (
    ADDED,
    BEST_RATIO,
    BOUND,
    CPU_RATIO,
    DIFFERENCE,
    LOGGED_RATE,
    MATCHED,
    ONE_PASS,
    PEAK,
    PER_CPU_S,
    RATE,
    RATIO,
    STEP_MS,
    Row,
    Subject,
)
from train_bench.towers import model_config

MIB = 1 << 20
MEMORY_BOUND = 1.3
"""Of a batch's peak, times a micro batch's peak with the batch's features."""
_CURVE = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40)


def peers(rounds: Sequence[Mapping[PeerJob, Answer]], about: About) -> list[Row]:
    """Both trainers' figures; ratios are taken round by round."""
    rate = {job: [_rate(job.layout, each[job].steps) for each in rounds] for job in rounds[0]}
    per_cpu_s = {job: [job.layout.global_batch * job.steps / each[job].cpu_s for each in rounds] for job in rounds[0]}
    best = max((job for job in rate if job.trainer == OPEN_CLIP), key=lambda job: float(np.median(rate[job])))
    rows = []
    for job in rounds[0]:
        answers = [each[job] for each in rounds]
        subject = Subject(
            about, "peers", job.layout, answers[0].num_parameters, job.trainer, job.source, job.setting, job.workers
        )
        rows += [subject.row(RATE, "1/s", rate[job]), subject.row(PER_CPU_S, "1/s", per_cpu_s[job])]
        rows += _times(subject, [step for answer in answers for step in answer.steps])
        if job.device == "cuda":
            rows.append(subject.row(PEAK, "MiB", [answer.peak_bytes / MIB for answer in answers]))
        logged = [answer.logged_pairs_per_s for answer in answers if answer.logged_pairs_per_s is not None]
        if logged:
            rows.append(subject.row(LOGGED_RATE, "1/s", logged))
        if job.trainer == OURS:
            peer = next(other for other in rate if other.trainer == OPEN_CLIP and other.setting == job.setting)
            for metric, figures, other in (
                (RATIO, rate, peer),
                (CPU_RATIO, per_cpu_s, peer),
                (BEST_RATIO, rate, best),
            ):
                rows.append(subject.row(metric, "", np.divide(figures[job], figures[other]).tolist()))
    return rows


def steps(layout: Layout, rounds: Sequence[Sequence[Answer]], one_pass: Sequence[Sequence[Answer]], about: About) -> list[Row]:
    """A layout's times and traffic, and how much longer it takes than in one pass, round by round."""
    subject = Subject(about, "step", layout, rounds[0][0].num_parameters)
    rows = [subject.row(RATE, "1/s", [_rate(layout, _mean(ranks)) for ranks in rounds])]
    rows += _times(subject, [step for ranks in rounds for step in _mean(ranks)])
    ratios = [_seconds(_mean(ranks)) / _seconds(_mean(other)) for ranks, other in zip(rounds, one_pass, strict=True)]
    rows.append(subject.row(ONE_PASS, "", ratios))
    traffic = [counts for ranks in rounds for answer in ranks for counts in answer.traffic]
    for kind in ("reduced", "gathered"):
        rows.append(subject.row(f"{kind} by a rank", "MiB", [counts.get(f"{kind}_bytes", 0) / MIB for counts in traffic]))
        rows.append(subject.row(f"{kind}, calls", "", [counts.get(f"{kind}_calls", 0) for counts in traffic]))
    return rows


def memory(layout: Layout, whole: Sequence[Answer], micro: Sequence[Answer], about: About) -> list[Row]:
    """The peak of a step on the whole batch, and of one on a micro batch a rank; of the rank that adds most."""
    parameters = whole[0].num_parameters
    small = replace(layout, global_batch=layout.micro_batch * layout.world)
    peaks = [max(answer.added_bytes for answer in answers) / MIB for answers in (whole, micro)]
    bound = MEMORY_BOUND * (peaks[1] + features_mib(layout))
    return [
        Subject(about, "batch", layout, parameters).row(ADDED, "MiB", [peaks[0]]),
        Subject(about, "batch", layout, parameters).row("features of a rank", "MiB", [features_mib(layout)]),
        Subject(about, "batch", layout, parameters).row(BOUND, "", [peaks[0] / bound]),
        Subject(about, "batch", small, parameters).row(ADDED, "MiB", [peaks[1]]),
    ]


def learning(layout: Layout, ranks: Sequence[Answer], about: About) -> list[Row]:
    """Speed and what was learned."""
    subject = Subject(about, "batch", layout, ranks[0].num_parameters)
    found = _mean(ranks)
    losses, last = ranks[0].losses, len(ranks[0].losses)
    rows = [subject.row(RATE, "1/s", [layout.global_batch / _seconds([step]) for step in found[1:]])]
    rows += [subject.row(f"loss at step {number}", "", [losses[number - 1]]) for number in _CURVE if number < last]
    rows.append(subject.row(f"loss at step {last}", "", [losses[-1]]))
    return [*rows, subject.row(MATCHED, "", [ranks[0].matched])]


def towers_alone(layout: Layout, ranks: Sequence[Answer], about: About) -> list[Row]:
    """How fast the towers are: steps of a micro batch a rank, in one pass."""
    subject = Subject(about, "batch", layout, ranks[0].num_parameters)
    return [subject.row(RATE, "1/s", [layout.global_batch / _seconds([step]) for step in _mean(ranks)])]


def difference(layout: Layout, ranks: Sequence[Answer], one_rank: Sequence[Answer], about: About) -> Row:
    """The largest relative difference of the first steps' losses to those on another number of ranks."""
    pairs = list(zip(ranks[0].losses, one_rank[0].losses, strict=False))[:2]
    largest = max(abs(loss - other) / abs(other) for loss, other in pairs)
    return Subject(about, "batch", layout, ranks[0].num_parameters).row(DIFFERENCE, "", [largest])


def features_mib(layout: Layout) -> float:
    """Of a rank's share: an image's and a text's, fp32."""
    return 2 * layout.share * model_config(layout.towers).embed_dim * 4 / MIB


def _times(subject: Subject, found: Sequence[Seconds]) -> list[Row]:
    """A step's time, and its parts' in milliseconds and as shares of it."""
    parts = [part for part in PARTS if any(part in step for step in found)]
    rows = [subject.row(STEP_MS, "ms", [1e3 * _seconds([step]) for step in found])]
    for part in parts:
        rows.append(subject.row(f"{part} of a step", "ms", [1e3 * step.get(part, 0.0) for step in found]))
    whole = _seconds(found)
    for part in parts:
        share = sum(step.get(part, 0.0) for step in found) / whole
        rows.append(subject.row(f"share of {part}", "", [share]))
    return rows


def _mean(ranks: Sequence[Answer]) -> list[Seconds]:
    """Step by step over ranks, which wait for each other."""
    return [
        {part: sum(step.get(part, 0.0) for step in found) / len(found) for part in PARTS if any(part in step for step in found)}
        for found in zip(*(answer.steps for answer in ranks), strict=True)
    ]


def _rate(layout: Layout, found: Sequence[Seconds]) -> float:
    return layout.global_batch * len(found) / _seconds(found)


def _seconds(found: Sequence[Seconds]) -> float:
    return sum(sum(step.values()) for step in found)
