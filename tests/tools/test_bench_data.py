"""The loader's benchmark: its shards, what it counts, what it makes of its measurements."""

import csv
import io
import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import simplejpeg
from torch.utils.data import DataLoader, IterableDataset

import bench_data
from data_bench import figure, pipelines, records, runner, shards, tables
from data_bench.points import OPEN_CLIP, OURS, STREAMING, WEBDATASET, Cost, Job, Point
from loss_bench.summary import About

ABOUT = About("2026-01-01", "abc", "command", "a processor", "2.14", 0.0, 2, 1)
STAGES = {"fetch", "read", "caption", "decode", "resize", "tokenize", "collate"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, shards.Made]:
    """32 samples of 96 px in four shards, as tars and as MDS."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, shards.make(folder, 96, 32, 4, ("tar", "mds"))


def test_shards_are_laid_out_as_img2dataset_does(made: tuple[Path, shards.Made]) -> None:
    folder, about = made
    assert about == shards.Made(32, 4, about.bytes_per_pixel)
    images = set()
    for number, path in enumerate(shards.tars(folder, 4)):
        assert json.loads(Path(path).with_name(f"{number:05d}_stats.json").read_text())["successes"] == 8
        with tarfile.open(path) as tar:
            names = tar.getnames()
            images |= {tar.extractfile(name).read() for name in names if name.endswith(".jpg")}
        assert sorted(names) == sorted(f"{8 * number + i:09d}.{end}" for i in range(8) for end in ("jpg", "txt", "json"))
    assert len(images) == 32
    assert {simplejpeg.decode_jpeg_header(image)[:2] for image in images} == {(96, 96)}
    assert about.bytes_per_pixel == pytest.approx(np.mean([len(image) for image in images]) / 96**2)


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_pictures_take_the_bytes_of_photographs(size: int) -> None:
    pixels = shards.picture(size, size, np.random.default_rng(0))
    assert 0.12 < len(simplejpeg.encode_jpeg(pixels, shards.QUALITY, colorsubsampling="420")) / size**2 < 0.26


def test_the_same_shards_are_made_again(made: tuple[Path, shards.Made], tmp_path: Path) -> None:
    folder, about = made
    assert shards.make(tmp_path, 96, 32, 4, ("tar",)) == about
    with tarfile.open(shards.tars(folder, 4)[2]) as one, tarfile.open(shards.tars(tmp_path, 4)[2]) as other:
        for name in one.getnames():
            assert one.extractfile(name).read() == other.extractfile(name).read()


def a_job(made: tuple[Path, shards.Made], task: str, pipeline: str, form: str, workers: int = 0) -> Job:
    return Job(Point(task, pipeline, form, 96, workers), made[0], batch=8, crop=32, least_cpu_s=0.01)


@pytest.mark.parametrize(
    ("task", "pipeline", "form", "workers"),
    [
        ("reader", OURS, "tar", 0),
        ("reader", OURS, "mds", 0),
        ("reader", WEBDATASET, "tar", 0),
        ("reader", STREAMING, "mds", 0),
        ("whole", OURS, "tar", 0),
        ("whole", OURS, "mds", 2),
        ("whole", OPEN_CLIP, "tar", 0),
        ("whole", OPEN_CLIP, "tar", 2),
        ("views", OURS, "tar", 0),
    ],
)
def test_every_pipeline_goes_over_all_samples(
    made: tuple[Path, shards.Made], task: str, pipeline: str, form: str, workers: int
) -> None:
    cost = pipelines.measure(a_job(made, task, pipeline, form, workers), made[1])["whole"]
    assert cost.samples > 0
    assert cost.samples % 32 == 0
    assert cost.cpu_s >= 0.01


@pytest.mark.parametrize(("pipeline", "stages"), [(OURS, STAGES), (OPEN_CLIP, STAGES - {"fetch", "caption"})])
def test_stages_are_told_apart(made: tuple[Path, shards.Made], pipeline: str, stages: set[str]) -> None:
    answer = pipelines.measure(a_job(made, "stages", pipeline, "tar"), made[1])
    assert set(answer) == stages
    assert all(cost.cpu_s > 0 for cost in answer.values())
    assert answer["decode"].cpu_s > answer["read"].cpu_s / 10


def burn(cpu_s: float) -> None:
    end = time.process_time() + cpu_s
    while time.process_time() < end:
        pass


class Burning(IterableDataset):
    """Items that take 10 ms of processor time each."""

    def __iter__(self) -> Iterator[int]:
        while True:
            burn(0.01)
            yield 1


@pytest.mark.parametrize("workers", [0, 1])
def test_processor_time_is_counted_wherever_it_is_spent(workers: int) -> None:
    samples = map(int, DataLoader(Burning(), batch_size=None, num_workers=workers))
    cost = pipelines._timed(samples, least_cpu_s=0.2, num_samples=5)
    assert cost.samples % 5 == 0
    # a loader process works ahead, by two items at most
    assert cost.cpu_s >= 0.01 * (cost.samples - 2)
    assert 0.2 <= cost.cpu_s < 0.4


def test_waiting_is_not_counted() -> None:
    def waiting() -> Iterator[int]:
        while True:
            time.sleep(0.02)
            burn(0.002)
            yield 1

    cost = pipelines._timed(waiting(), least_cpu_s=0.01, num_samples=2)
    assert cost.wall_s > 3 * cost.cpu_s


def a_plan(**changes: object) -> runner.Plan:
    plan = runner.Plan([96], [0, 2, 3], ["tar", "mds"], ["reader", "stages", "whole"], 100, 8, 32, 2, 0.1, 60, Path())
    return replace(plan, **changes)


def test_the_plan_compares_like_with_like() -> None:
    points = a_plan().points(96)
    assert len(points) == len(set(points)) == 4 + 3 + 9
    assert {point.workers for point in points if point.task != "whole"} == {0}
    for workers in (0, 2, 3):
        whole = {(point.pipeline, point.format) for point in points if point.task == "whole" and point.workers == workers}
        assert whole == {(OURS, "tar"), (OURS, "mds"), (OPEN_CLIP, "tar")}


@pytest.mark.parametrize(
    ("workers", "samples", "expected"),
    [([0], 100, (4, 128)), ([0, 2, 3], 100, (6, 144)), ([8], 64, (8, 64)), ([1], 1, (4, 32))],
)
def test_every_loader_process_gets_as_many_whole_batches(workers: list[int], samples: int, expected: tuple[int, int]) -> None:
    plan = a_plan(workers=workers, samples=samples)
    assert (plan.num_shards, plan.num_samples) == expected


def some_rows(cost_us: float, point: Point, parts: tuple[str, ...] = ("whole",)) -> list[records.Row]:
    rounds = [Cost(100, 100e-6 * cost_us * factor, 200e-6 * cost_us) for factor in (0.9, 1.3, 1.0)]
    answers = [dict.fromkeys(parts, cost) for cost in rounds]
    return records.rows(point, answers, shards.Made(100, 4, 0.2), 8, 32, ABOUT)


def a_record() -> list[records.Row]:
    found = []
    for size in (256, 512):
        for form in ("tar", "mds"):
            found += some_rows(20, Point("reader", OURS, form, size, 0))
            found += some_rows(100, Point("stages", OURS, form, size, 0), ("read", "decode", "resize"))
            for workers in (0, 1, 2):
                found += some_rows(500, Point("whole", OURS, form, size, workers))
        found += some_rows(160, Point("reader", WEBDATASET, "tar", size, 0))
        found += some_rows(40, Point("reader", STREAMING, "mds", size, 0))
        found += some_rows(300, Point("stages", OPEN_CLIP, "tar", size, 0), ("read", "decode"))
        for workers in (0, 1, 2):
            found += some_rows(2000 + workers, Point("whole", OPEN_CLIP, "tar", size, workers))
    return found


def test_a_row_has_the_median_and_the_spread() -> None:
    (row,) = some_rows(50, Point("whole", OURS, "tar", 256, 1))
    assert (row.cpu_us_min, row.cpu_us_p50, row.cpu_us_max) == pytest.approx((45, 50, 65))
    assert row.per_cpu_s == pytest.approx(20_000)
    assert row.wall_us_p50 == pytest.approx(100)
    assert (row.rounds, row.samples, row.label()) == (3, 100, "scaleclip (tar)")


def test_ours_is_compared_with_the_same_task_at_the_same_size_and_processes() -> None:
    found = a_record()
    for row in found:
        other = records.peer(row, found)
        if row.pipeline != OURS or row.task == "stages":
            assert other is None
        else:
            assert other.pipeline == {"reader": WEBDATASET, "whole": OPEN_CLIP}[row.task]
            assert (other.size, other.workers, other.format) == (row.size, row.workers, "tar")


def shown(table: object) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_tables_say_the_ratio_and_the_sum() -> None:
    found = [row for row in a_record() if row.size == 256]
    text = shown(tables.whole(found))
    assert "8.00 (webdataset)" in text
    assert "4.00 (open_clip)" in text
    assert "2,000 (1,538 - 2,222)" in text
    by_stage = shown(tables.stages(found))
    assert next(line for line in by_stage.splitlines() if "sum" in line).split("│")[2:4] == [
        "             300 ",
        "             300 ",
    ]
    assert tables.stages([row for row in found if row.task != "stages"]) is None


def test_measuring_again_replaces_the_row(tmp_path: Path) -> None:
    path = tmp_path / "record.csv"
    records.record(path, a_record())
    found = records.read(path)
    assert [row.key() for row in found] == [row.key() for row in a_record()]
    assert found[0].cpu_us_p50 == 20
    again = [replace(found[0], cpu_us_p50=7.0, date="2026-02-02", commit="def", load=3.0)]
    records.record(path, again)
    assert records.read(path) == again + found[1:]
    records.record(path, [replace(found[0], workers=9), replace(found[0], machine="another")])
    assert len(records.read(path)) == len(found) + 2
    assert {len(line) for line in csv.reader(path.open(newline=""))} == {len(fields(records.Row))}


def test_a_file_that_is_no_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a record"):
        records.read(path)
    with pytest.raises(SystemExit) as exit_:
        bench_data.main(["--from-csv", str(path), "--plot", str(tmp_path / "a.png")])
    assert exit_.value.code == 2
    assert "is not a record" in capsys.readouterr().err


def test_plot_is_drawn_from_the_record(tmp_path: Path) -> None:
    record, path = tmp_path / "data.csv", tmp_path / "data.png"
    records.record(record, a_record())
    assert bench_data.main(["--from-csv", str(record), "--plot", str(path)]) == 0
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 300
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("task", ["reader", "stages", "whole"])
def test_a_part_of_the_record_can_be_drawn(tmp_path: Path, task: str) -> None:
    figure.draw([row for row in a_record() if row.task == task and row.workers == 0], tmp_path / "data.png")
    assert (tmp_path / "data.png").exists()


def test_plot_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        figure.draw([], tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "all"], "'all' is not one of reader, stages, whole"),
        (["--format", "zip"], "'zip' is not one of tar, mds"),
        (["--workers", "-1"], "'-1' is not a whole number"),
        (["--size", "0"], "'0' is not a whole number above 0"),
        (["--csv", "data.txt"], "'data.txt' is not a path that ends in .csv"),
        (["--from-csv", "data.csv"], "give --plot PATH"),
        (["--from-csv", "missing.csv", "--plot", "a.png"], "missing.csv does not exist"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench_data.main(arguments)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_a_measurement_that_fails_says_why(made: tuple[Path, shards.Made], tmp_path: Path) -> None:
    _, about = made
    with pytest.raises(runner.MeasurementFailed, match=r"reader of webdataset, tar, 96 px, 0 workers: .*00000\.tar"):
        runner.run_job(replace(a_job(made, "reader", WEBDATASET, "tar"), shards=tmp_path), about, 60)
    with pytest.raises(runner.MeasurementFailed, match=r"took more than 0\.1 s"):
        runner.run_job(a_job(made, "reader", WEBDATASET, "tar"), about, 0.1)


@pytest.mark.slow
def test_a_small_run_measures_prints_records_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "96", "--crop", "32", "--batch", "8", "--samples", "32", "--rounds", "1", "--least-cpu", "0.05"]
    arguments += ["--csv", str(tmp_path / "data.csv"), "--plot", str(tmp_path / "data.png")]
    assert bench_data.main(arguments) == 0
    rows = records.read(tmp_path / "data.csv")
    assert {(row.task, row.pipeline) for row in rows} == {
        ("reader", OURS), ("reader", WEBDATASET), ("stages", OURS), ("stages", OPEN_CLIP), ("views", OURS), ("whole", OURS),
        ("whole", OPEN_CLIP),
    }  # fmt: skip
    assert all(row.command.startswith("python tools/bench_data.py --size 96") for row in rows)
    assert all(row.cpu_us_min <= row.cpu_us_p50 <= row.cpu_us_max for row in rows)
    assert "(open_clip)" in capsys.readouterr().out
    assert (tmp_path / "data.png").exists()
