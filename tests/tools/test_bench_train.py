"""The trainer's benchmark: its pairs, its towers, its clock, what it makes of its measurements."""

import csv
import io
from dataclasses import fields, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import bench_train
from loss_bench.summary import About
from scaleclip.models.dual_encoder import DualEncoder
from train_bench import figure, laps, records, runner, summary, tables, towers
from train_bench.pairs import BASE, DIGITS, NUM_CLASSES, Pairs
from train_bench.points import (
    BACKWARD,
    DATA,
    FIRST_PASS,
    FORWARD,
    GATHER,
    LOSS,
    OPEN_CLIP,
    OURS,
    OUTSIDE,
    REDUCE,
    STEP,
    Answer,
    Layout,
    LearnJob,
    MemoryJob,
    PeerJob,
    StepJob,
)
from train_bench.ready_batch import ready_batch
from train_bench.window import Window

ABOUT = About("2026-01-01", "abc", "command", "a processor", "2.14", 0.0, 2, 1)
DIGITS_LAYOUT = Layout("digits", 4096, 512, 1, 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the stopwatch sees pass when something is slept: append to it."""
    passed = [0.0]
    monkeypatch.setattr(laps.time, "perf_counter", lambda: sum(passed))
    return passed


def test_time_counts_for_the_innermost_part_of_its_step(clock: list[float]) -> None:
    watch = laps.Stopwatch()
    clock.append(100)
    for scale in (1, 10):
        watch.next_step()
        clock.append(1 * scale)
        with watch.part("backward"):
            clock.append(2 * scale)
            watch.timed(lambda scale=scale: clock.append(4 * scale), "reduce")()
            clock.append(8 * scale)
        clock.append(16 * scale)
    watch.next_step()
    assert watch.steps == [
        {OUTSIDE: 17, "backward": 10, "reduce": 4},
        {OUTSIDE: 170, "backward": 100, "reduce": 40},
        {},
    ]


def test_a_part_that_fails_ends(clock: list[float]) -> None:
    watch = laps.Stopwatch()
    watch.next_step()

    def fail() -> None:
        clock.append(3)
        raise KeyError

    with pytest.raises(KeyError):
        watch.timed(fail, lambda: "loss")()
    assert watch.is_outside
    clock.append(5)
    watch.next_step()
    assert watch.steps[0] == {OUTSIDE: 5, "loss": 3}


def a_peer_job(**changes: object) -> PeerJob:
    layout = Layout("tiny", 8, 8, 1, 1)
    job = PeerJob(OURS, "memory", "plain", layout, 2, 3, 0, 2, (), Path())
    return replace(job, **changes)


def test_the_window_leaves_out_the_warm_up_and_the_end(clock: list[float]) -> None:
    def batches():
        for number in range(10):
            clock.append(0.25)
            yield number

    window = Window(a_peer_job())
    for number in window.watched(batches()):
        clock.append(10.0 * (number + 1))
    assert window.steps == [{DATA: 0.25, OUTSIDE: 10 * (number + 1)} for number in (2, 3, 4)]
    assert 0 <= window.cpu_s < 5


def test_a_gpu_is_waited_for_at_both_ends_of_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name, answer in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 3 << 20)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, answer=answer: calls.append(name) or answer)
    window = Window(a_peer_job(device="cuda"))
    for number in window.watched(iter(range(10))):
        calls.append(number)
    begin = ["synchronize", "reset_peak_memory_stats", "max_memory_allocated"]
    assert calls == [0, 1, *begin, 2, 3, 4, "synchronize", "max_memory_allocated", 5, 6, 7, 8, 9]
    assert window.peak_bytes == 3 << 20


@pytest.mark.parametrize(("job", "is_hidden"), [(a_peer_job(), True), (a_peer_job(device="cuda"), False)])
def test_a_gpu_is_hidden_from_what_is_not_measured_on_it(
    job: PeerJob, is_hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    environment = runner._environment(job)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment.get("DS_ACCELERATOR")) == (
        ("", "cpu") if is_hidden else ("5", None)
    )


def test_trainers_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its memory and its own step time, and nothing of where the host's time goes."""
    arguments = ["peers", "--towers", "digits", "--batch", "16", "--device", "cuda", "--rounds", "1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_train.main(arguments)
    assert "argument --device: cuda needs a GPU, and torch finds none" in capsys.readouterr().err
    jobs = answers_at_once(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert bench_train.main([*arguments, "--csv", str(tmp_path / "train.csv")]) == 0
    assert {job.device for job in jobs} == {"cuda"}
    rows = records.read(tmp_path / "train.csv")
    assert {row.machine for row in rows} == {"a GPU"}
    assert [row.metric for row in rows].count("peak GPU memory") == 2
    shown = capsys.readouterr().out
    assert "GPU MiB" in shown
    assert "limited by" in shown
    assert "towers (" not in shown


def test_pairs_are_the_same_in_every_layout() -> None:
    pairs = Pairs(towers.model_config("digits"))
    whole = pairs.chunk(3, range(64))
    parts = list(pairs.batch(3, range(0, 32, 24))) + list(pairs.batch(3, range(32, 64, 16)))
    assert [len(part.ids_B) for part in parts] == [24, 8, 16, 16]
    for name in ("pixels_BCHW", "ids_B", "valid_B", "seeds_B"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.tokens_BT[0] for part in parts]), whole.tokens_BT[0])
    assert not torch.equal(pairs.chunk(4, range(64)).ids_B, whole.ids_B)


def test_a_class_is_written_one_way_and_drawn_under_noise() -> None:
    batch = Pairs(towers.model_config("digits")).chunk(0, range(2 * NUM_CLASSES))
    classes, counts = batch.ids_B.unique(return_counts=True)
    assert len(classes) > 0.8 * NUM_CLASSES
    assert int(counts.max()) < 20
    repeated = int(classes[counts.argmax()])
    here = batch.ids_B == repeated
    assert len(batch.tokens_BT[0][here].unique(dim=0)) == 1
    assert len(batch.tokens_BT[0].unique(dim=0)) == len(classes)
    for place in range(DIGITS):
        assert batch.tokens_BT[0][:, 1 + place].unique().tolist() == list(range(1 + BASE * place, 1 + BASE * (place + 1)))
    images_ND = batch.pixels_BCHW[here].float().flatten(1)
    other_D = batch.pixels_BCHW[~here][0].float().flatten()
    within, between = (images_ND[0] - images_ND[1]).norm(), (images_ND[0] - other_D).norm()
    assert 0 < within < between / 2


@pytest.mark.parametrize("name", ["small", "digits", "tiny", "ViT-S/32"])
def test_the_peer_has_the_same_towers(name: str) -> None:
    from open_clip.model import CLIP

    model = towers.model_config(name)
    config = towers.open_clip_config(model)
    with torch.device("meta"):
        theirs, ours = CLIP(**config), DualEncoder(model)
    assert towers.num_parameters(model) == sum(parameter.numel() for parameter in theirs.parameters())
    assert len(ours.image.body.vision_model.encoder.layers) == len(theirs.visual.transformer.resblocks)
    assert len(ours.text.body.text_model.encoder.layers) == len(theirs.transformer.resblocks)
    heads = ours.image.body.vision_model.encoder.layers[0].self_attn.num_heads
    assert heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert type(theirs.transformer.resblocks[0].mlp.gelu) is torch.nn.GELU


def test_towers_that_the_peer_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="open_clip has no towers like convnext"):
        towers.open_clip_config(towers.model_config("ConvNeXt-demo"))


def test_both_trainers_get_the_same_batch() -> None:
    model = towers.model_config("tiny")
    ready = ready_batch(model, 5)
    batch, (images_BCHW, tokens_BT) = ready.scaleclip(), ready.open_clip()
    torch.testing.assert_close(DualEncoder(model)._normalise(batch.pixels_BCHW), images_BCHW)
    assert torch.equal(batch.tokens_BT[0], tokens_BT)
    ids = model.text.config
    end_B = (tokens_BT == ids["eos_token_id"]).int().argmax(1)
    assert (tokens_BT[:, 0] == ids["bos_token_id"]).all()
    assert all(7 <= end < 27 and not tokens_BT[row, end + 1 :].any() for row, end in enumerate(end_B.tolist()))


def seconds(scale: float, **parts: float) -> dict[str, float]:
    return {name.replace("_", " "): value * scale for name, value in parts.items()}


def a_step(scale: float = 1.0) -> dict[str, float]:
    """One second."""
    return seconds(scale, data=0.1, forward=0.3, loss=0.05, backward=0.4, step=0.1, outside=0.05)


def some_peers() -> list[records.Row]:
    layout = Layout("small", 100, 100, 1, 1)
    jobs = [
        a_peer_job(trainer=trainer, setting=setting, layout=layout, source="shards", workers=1, steps=2)
        for setting in ("plain", "medium")
        for trainer in (OURS, OPEN_CLIP)
    ]
    took = {(OURS, "plain"): 1.0, (OPEN_CLIP, "plain"): 2.0, (OURS, "medium"): 1.0, (OPEN_CLIP, "medium"): 1.5}
    rounds = [
        {
            job: Answer(
                [a_step(slow * took[job.trainer, job.setting])] * 2, 1000, cpu_s=slow * took[job.trainer, job.setting] ** 2,
                logged_pairs_per_s=50.0,
            )
            for job in jobs
        }
        for slow in (1.0, 3.0, 1.2)
    ]  # fmt: skip
    return summary.peers(rounds, ABOUT)


def figures(rows: list[records.Row], **wanted: object) -> dict[str, records.Row]:
    """The one point of some rows that is as wanted."""
    (found,) = [
        point
        for point in records.points(rows)
        if all(getattr(next(iter(point.values())), name) == value for name, value in wanted.items())
    ]
    return found


def test_trainers_are_compared_round_by_round() -> None:
    """A slow minute that falls on a whole round does not show in the ratios."""
    ours = figures(some_peers(), trainer=OURS, setting="plain")
    assert ours[records.RATE].p50 == pytest.approx(100 / 1.2)
    assert ours[records.STEP_MS].p50 == pytest.approx(1200)
    assert ours[records.PER_CPU_S].p50 == pytest.approx(200 / 1.2)
    for metric, ratio in ((records.RATIO, 2), (records.CPU_RATIO, 4), (records.BEST_RATIO, 1.5)):
        row = ours[metric]
        assert (row.p20, row.p50, row.p80) == pytest.approx((ratio, ratio, ratio))
    assert figures(some_peers(), trainer=OURS, setting="medium")[records.RATIO].p50 == pytest.approx(1.5)
    assert ours["share of outside"].p50 == pytest.approx(0.05)
    assert ours["share of data"].p50 == pytest.approx(0.1)
    assert ours["backward of a step"].count == 6
    theirs = figures(some_peers(), trainer=OPEN_CLIP, setting="plain")
    assert records.RATIO not in theirs
    assert theirs[records.RATE].p50 == pytest.approx(50 / 1.2)


def shown(table: object) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=320).print(table)
    return out.getvalue()


def test_the_table_of_trainers_says_ratios_and_the_limit() -> None:
    text = shown(tables.peers(some_peers()))
    line = next(line for line in text.splitlines() if line.startswith("│ scaleclip │ plain"))
    for cell in ("83.3 (53.3 - 93.3)", "2.000 (2.000 - 2.000)", "1.500 (1.500 - 1.500)", "5.0%", "towers (70%)"):
        assert cell in line


def some_steps() -> list[records.Row]:
    rows = []
    for stage, when in ((1, "chunk"), (2, "chunk"), (2, "step")):
        one_pass = Layout("digits", 1024, 512, 2, stage)
        chunked = replace(one_pass, micro_batch=128, reduce_gradients=when)
        whole = [[Answer([a_step()] * 2, 1000, traffic=[{}] * 2)] * 2] * 3
        parts = [
            Answer(
                [seconds(scale, first_pass=0.3, forward=0.3, backward=0.4, reduce=0.2, outside=0.05)] * 2,
                1000,
                traffic=[{"reduced_bytes": 3 << 20, "reduced_calls": 4, "gathered_bytes": 1 << 19, "gathered_calls": 1}] * 2,
            )
            for scale in (1.0, 1.4)
        ]
        if when == "chunk":
            rows += summary.steps(one_pass, whole, whole, ABOUT)
        rows += summary.steps(chunked, [parts] * 3, whole, ABOUT)
    return rows


def test_a_layout_is_compared_with_one_pass_and_its_traffic_is_a_step_s() -> None:
    found = figures(some_steps(), stage=2, micro_batch=128, reduce_gradients="step")
    assert found[records.ONE_PASS].p50 == pytest.approx(1.25 * 1.2)
    assert found[records.RATE].p50 == pytest.approx(1024 / 1.5)
    assert found["reduce of a step"].p50 == pytest.approx(240)
    assert (found["reduced by a rank"].p50, found["reduced, calls"].p50) == (3, 4)
    assert (found["gathered by a rank"].p50, found["gathered, calls"].p50) == (0.5, 1)
    assert "0.50 (1)" in shown(tables.step(some_steps()))


def some_batches() -> list[records.Row]:
    rows = []
    one_rank = [Answer(losses=[10.0, 9.0])]
    for world in (1, 2):
        layout = Layout("digits", 32_768, 512, world, 1)
        losses = [10.0, 9.0 * (1 + 1e-6), *np.linspace(8, 2, 48)] if world == 2 else [10.0, 9.0, *np.linspace(8, 2, 48)]
        steps = [Answer([a_step(30.0)] + [a_step(8.0)] * 49, 1000, losses=losses, matched=0.5)] * world
        whole = [Answer(num_parameters=1000, added_bytes=bytes_ << 20) for bytes_ in (130, 120)[:world]]
        micro = [Answer(num_parameters=1000, added_bytes=100 << 20)] * world
        rows += summary.towers_alone(replace(layout, global_batch=512 * world), [Answer([a_step(0.1)], 1000)] * world, ABOUT)
        rows += summary.memory(layout, whole, micro, ABOUT)
        rows += summary.learning(layout, steps, ABOUT)
        rows.append(summary.difference(layout, steps, one_rank, ABOUT))
    return rows


def test_a_large_batch_is_held_against_a_micro_batch_and_its_features() -> None:
    for world in (1, 2):
        found = figures(some_batches(), world=world, global_batch=32_768)
        assert found["features of a rank"].p50 == 32_768 / world * 32 * 2 * 4 / 2**20
        assert found[records.ADDED].p50 == 130
        assert found[records.BOUND].p50 == pytest.approx(130 / (1.3 * (100 + 8 / world)))
        assert found[records.RATE].p50 == 4096, "the first step pays for what is made once"
        assert found[records.DIFFERENCE].p50 == pytest.approx((world - 1) * 1e-6)
        assert found["loss at step 50"].p50 == 2
        micro = figures(some_batches(), world=world, global_batch=512 * world)
        assert micro[records.ADDED].p50 == 100
        assert micro[records.RATE].p50 == pytest.approx(5120 * world)
    text = shown(tables.batch(some_batches()))
    assert "10.0000 (1), 2.0000 (50)" in text
    assert "50.0%" in text


def test_measuring_again_replaces_all_of_a_point(tmp_path: Path) -> None:
    path = tmp_path / "record.csv"
    found = [*some_peers(), *some_steps(), *some_batches()]
    records.record(path, found)
    assert [row.key() for row in records.read(path)] == [row.key() for row in found]
    assert len({row.key() for row in found}) == len(found)
    again = [replace(row, p50=7.0, date="2026-02-02") for row in some_peers() if row.trainer == OURS][:3]
    records.record(path, again)
    now = records.read(path)
    assert [row for row in now if row.date == "2026-02-02"] == now[-3:]
    measured = {row.point() for row in again}
    assert not [row for row in now[:-3] if row.point() in measured]
    assert {row.point() for row in now} == {row.point() for row in found}
    assert {len(line) for line in csv.reader(path.open(newline=""))} == {len(fields(records.Row))}


def test_a_file_that_is_no_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as exit_:
        bench_train.main(["draw", str(path), str(tmp_path / "a.png")])
    assert exit_.value.code == 2
    assert "other.csv is not a record of bench_train.py" in capsys.readouterr().err


@pytest.mark.parametrize("benches", ["peers batch step", "peers", "batch", "step"])
def test_the_record_is_drawn(tmp_path: Path, benches: str) -> None:
    record, path = tmp_path / "train.csv", tmp_path / "train.png"
    records.record(record, [row for row in (*some_peers(), *some_batches(), *some_steps()) if row.bench in benches.split()])
    assert bench_train.main(["draw", str(record), str(path)]) == 0
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20


def test_a_picture_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        figure.draw([], tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: BENCH"),
        (["peers", "--source", "disk"], "invalid choice: 'disk'"),
        (["peers", "--setting", "plain,fast"], "'fast' is not one of plain, medium, compile"),
        (["peers", "--towers", "ConvNeXt-demo"], "open_clip has no towers like convnext"),
        (["peers", "--towers", "tiny", "--source", "shards"], "tiny reads another vocabulary"),
        (["peers", "--csv", "train.txt"], "'train.txt' is not a path that ends in .csv"),
        (["batch", "--world", "3"], "32768 pairs are to be split evenly over 3 ranks"),
        (["batch", "--batch", "1024", "--world", "2"], "each with more than --micro-batch 512"),
        (["step", "--stage", "4"], "'4' is not 0, 1, 2 or 3"),
        (["step", "--batch", "9"], "9 pairs cannot be split evenly over --world 2"),
        (["draw", "missing.csv", "a.png"], "'missing.csv' is not a file that exists"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench_train.main(arguments)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def answers_at_once(monkeypatch: pytest.MonkeyPatch, parameters: dict[str, int] | None = None) -> list[object]:
    """Let jobs be answered without processes; returns the jobs that were run."""
    jobs: list[object] = []

    def answered(job: object, timeout_s: float) -> list[Answer]:
        jobs.append(job)
        number = (parameters or {}).get(getattr(job, "trainer", ""), 121_729)
        losses = np.linspace(10, 2, getattr(job, "steps", 1)).tolist()
        return [Answer([a_step()] * job.steps, number, 1.0, 10.0, 1 << 27, losses, 0.9, [{}] * job.steps)] * job.layout.world

    monkeypatch.setattr(bench_train, "run_job", answered)
    return jobs


def test_trainers_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = answers_at_once(monkeypatch)
    arguments = ["peers", "--towers", "digits", "--batch", "16", "--setting", "plain,medium", "--rounds", "2", "--threads", "2"]
    assert bench_train.main([*arguments, "--csv", str(tmp_path / "train.csv")]) == 0
    assert [(job.trainer, job.setting) for job in jobs] == [
        (trainer, setting) for _ in range(2) for setting in ("plain", "medium") for trainer in (OURS, OPEN_CLIP)
    ]
    assert {replace(job, trainer="", setting="plain", folder=Path()) for job in jobs} == {
        PeerJob("", "memory", "plain", Layout("digits", 16, 16, 1, 1, threads=2), 2, 8, 0, 10, (), Path())
    }
    rows = records.read(tmp_path / "train.csv")
    assert {row.command for row in rows} == {
        "python tools/bench_train.py " + " ".join(arguments) + f" --csv {tmp_path}/train.csv"
    }
    assert "1.000 (1.000 - 1.000)" in capsys.readouterr().out


def test_unequal_towers_are_not_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers_at_once(monkeypatch, {OPEN_CLIP: 121_728})
    assert bench_train.main(["peers", "--towers", "digits"]) == 1
    assert "open_clip, plain, digits from memory has 121,728 parameters, and not 121,729" in capsys.readouterr().err


def test_layouts_are_one_pass_and_every_micro_batch_and_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = answers_at_once(monkeypatch)
    arguments = ["step", "--towers", "digits", "--batch", "64", "--micro-batch", "32,8", "--stage", "1,3", "--rounds", "1"]
    assert bench_train.main(arguments) == 0
    layouts = [(job.layout.stage, job.layout.micro_batch, job.layout.reduce_gradients) for job in jobs]
    assert layouts == [(1, 32, "chunk"), (1, 8, "chunk"), (3, 32, "chunk"), (3, 8, "chunk"), (3, 8, "step")]


def test_a_large_batch_takes_its_four_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = answers_at_once(monkeypatch)
    assert bench_train.main(["batch", "--steps", "4", "--csv", str(tmp_path / "train.csv")]) == 0
    assert [(type(job), job.layout.world, job.layout.global_batch) for job in jobs] == [
        (kind, world, batch)
        for world in (1, 2)
        for kind, batch in (
            (MemoryJob, 512 * world),
            (MemoryJob, 32_768),
            (StepJob, 512 * world),
            (LearnJob, 32_768),
        )
    ]
    assert {row.metric for row in records.read(tmp_path / "train.csv")} >= {"loss at step 1", "loss at step 4", "matched"}


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    job = a_peer_job(layout=Layout("no such towers", 8, 8, 1, 1), folder=tmp_path)
    with pytest.raises(runner.MeasurementFailed, match=r"rank 0: .*no such towers"):
        runner.run_job(job, 60)
    with pytest.raises(runner.MeasurementFailed, match=r"took more than 0\.1 s"):
        runner.run_job(job, 0.1)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_are_timed_by_part_and_their_traffic_is_counted(world: int) -> None:
    """Under ZeRO-2 gradients travel after every chunk."""
    parameters = towers.num_parameters(towers.model_config("digits"))
    for answer in runner.run_job(StepJob(Layout("digits", 32 * world, 16, world, 2), 1, 2), 120):
        assert len(answer.steps) == len(answer.traffic) == 2
        assert answer.num_parameters == parameters
        for step, counts in zip(answer.steps, answer.traffic, strict=True):
            gathers = {GATHER} if world > 1 else set()
            assert set(step) == {DATA, FIRST_PASS, FORWARD, LOSS, BACKWARD, REDUCE, STEP, OUTSIDE} | gathers
            assert step[BACKWARD] > step[OUTSIDE] / 10
            assert 8 * parameters <= counts["reduced_bytes"] < 8 * (parameters + 100)
            assert (counts.get("gathered_bytes", 0) >= 4 * parameters // world) == (world > 1)


def test_open_clips_trainer_trains_on_the_batch_in_memory(tmp_path: Path) -> None:
    job = a_peer_job(trainer=OPEN_CLIP, layout=Layout("tiny", 16, 16, 1, 1), folder=tmp_path, warm_up=2, steps=4)
    (answer,) = runner.run_job(job, 120)
    assert len(answer.steps) == 4
    for step in answer.steps:
        assert set(step) == {DATA, FORWARD, LOSS, BACKWARD, STEP, OUTSIDE}
        assert step[OUTSIDE] < 0.5 * sum(step.values())
    assert answer.num_parameters == towers.num_parameters(towers.model_config("tiny"))
    assert answer.losses[-1] < answer.losses[0]
    assert answer.cpu_s > 0
    assert answer.logged_pairs_per_s > 0


@pytest.mark.slow
@pytest.mark.parametrize("source", ["memory", "shards"])
def test_a_small_comparison_measures_prints_records_and_draws(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["peers", "--source", source, "--towers", "small", "--batch", "16", "--samples", "64", "--size", "96"]
    arguments += ["--warm-up", "2", "--steps", "4", "--log-every", "2", "--rounds", "1"]
    arguments += ["--csv", str(tmp_path / "train.csv"), "--plot", str(tmp_path / "train.png")]
    assert bench_train.main(arguments) == 0
    rows = records.read(tmp_path / "train.csv")
    for trainer in (OURS, OPEN_CLIP):
        found = figures(rows, trainer=trainer, source=source)
        assert found["share of backward"].p50 > 0.05
        whole = found[records.RATE].p50
        assert found[records.LOGGED_RATE].p50 == pytest.approx(whole, rel=0.5)
        assert sum(row.p50 for metric, row in found.items() if metric.startswith("share of")) == pytest.approx(1, rel=1e-3)
    assert figures(rows, trainer=OURS)[records.RATIO].p50 > 0
    assert (tmp_path / "train.png").exists()
    assert "limited by" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_of_32768_pairs_have_one_loss_and_little_memory() -> None:
    losses = []
    for world in (1, 2):
        layout = Layout("digits", 32_768, 512, world, 1)
        micro = runner.run_job(MemoryJob(replace(layout, global_batch=512 * world), 2), 300)
        whole = runner.run_job(MemoryJob(layout, 2), 600)
        found = figures(summary.memory(layout, whole, micro, ABOUT), global_batch=32_768)
        assert found[records.BOUND].p50 <= 1
        losses.append(whole[0].losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_steps_on_the_pairs_learn() -> None:
    (answer,) = runner.run_job(LearnJob(Layout("digits", 2048, 256, 1, 1), 40, 3e-3), 600)
    assert len(answer.losses) == len(answer.steps) == 40
    assert answer.losses[-1] < 0.7 * answer.losses[0]
    assert answer.matched > 100 / NUM_CLASSES
