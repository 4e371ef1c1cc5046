"""The tuner's choices: by machine code or by time, and what becomes of the rows that are there."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import tune_kernels
from kernel_inspection import timing
from scaleclip_kernels.tuning import OTHER, Key, Launch

KEY = Key("sm90", "softmax_sums", "16 bits", False)
LAUNCH = Launch(128, 128, 64, num_warps=4, num_stages=3, tma=True)
CONSOLE = Console(quiet=True)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launch table with a measured row and an estimated one."""
    monkeypatch.setattr(tune_kernels, "PATH", tmp_path / "launches.csv")
    estimated = KEY._replace(kernel="sigmoid")
    tune_kernels._write({KEY: (LAUNCH, "time on a GPU"), estimated: (LAUNCH, "machine code")}, keep_timed=False)
    return tmp_path / "launches.csv"


def stages(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["kernel"]: row["num_stages"] for row in csv.DictReader(file)}


@pytest.mark.parametrize(("keep_timed", "sums"), [(True, "3"), (False, "4")])
def test_what_was_measured_gives_way_only_where_it_is_meant_to(table: Path, keep_timed: bool, sums: str) -> None:
    other = replace(LAUNCH, num_stages=4), "machine code"
    tune_kernels._write({KEY: other, KEY._replace(kernel="sigmoid"): other}, keep_timed=keep_timed)
    assert stages(table) == {"softmax_sums": sums, "sigmoid": "4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--products", "fp8"], "--products fp8 is not one of 16 bits, ieee, tf32x3"),
        (["--architecture", "sm75"], "--architecture sm75 is not one of sm80, sm90, sm100, gfx942"),
        (["--jobs", "0"], "--jobs 0 must be at least 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_kernels.main(["--by", "machine-code", *arguments])
    assert message in capsys.readouterr().err


def test_the_fastest_that_does_not_spill_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list(tune_kernels.candidates("sm90", "16 bits", tune_kernels.GROUPS))
    assert {launch.group for launch in tried} == set(tune_kernels.GROUPS)
    seconds = {launch: 1.0 + number for number, launch in enumerate(tried)}
    faults = {(KEY, launch): "" for launch in tried} | {(KEY, tried[0]): "wrong: off by 1.0e+00"}

    def time_launch(key: Key, launch: Launch, batch: int) -> float:
        if launch == tried[1]:
            raise RuntimeError("out of memory")
        return seconds[launch]

    monkeypatch.setattr(tune_kernels, "time_launch", time_launch)
    monkeypatch.setattr(tune_kernels, "_spills", lambda key, launch: "spills" if launch == tried[2] else "")
    assert tune_kernels._by_time(CONSOLE, KEY, 64, faults) == tried[3]
    monkeypatch.setattr(tune_kernels, "_spills", lambda key, launch: "spills")
    assert tune_kernels._by_time(CONSOLE, KEY, 64, faults) is None


def test_machine_code_of_a_chip_that_is_not_known_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_kernels, "_inspect_all", lambda variants: "does not compile: KeyError")
    assert tune_kernels._spills(KEY._replace(architecture="sm89"), LAUNCH) == ""
    assert tune_kernels._spills(KEY, LAUNCH) == "does not compile: KeyError"


@pytest.mark.parametrize("kernel", ["softmax_sums", "softmax_gradients", "sigmoid"])
def test_a_launch_whose_results_are_the_panels_has_no_fault(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, on few pairs."""
    monkeypatch.setattr(timing, "_CHECKED_PAIRS", 70)
    monkeypatch.setattr(timing, "DIM", 32)
    key = Key(OTHER, kernel, "16 bits", False)  # type: ignore[arg-type]
    launch = Launch(64, 64, 32, num_warps=4, num_stages=1, tma=False)
    assert timing.fault_of(key, launch, device="cpu") == ""
    monkeypatch.setitem(timing._ALLOWED, timing.torch.bfloat16, 1e-9)
    assert timing.fault_of(key, launch, device="cpu").startswith("wrong: off by ")
    assert timing.fault_of(key, replace(launch, block_dim=24), device="cpu")
