"""Train every system of configs/demo for several seeds and compare what each reaches on the held-out splits.

python tools/measure_systems.py                            every system, seeds 0 1 2, into tools/results/systems.csv
python tools/measure_systems.py --systems clip,laclip --seeds 0 --csv /tmp/two.csv
python tools/measure_systems.py --table                    print the recorded figures as a Markdown table

A run takes a core; --jobs run side by side. What is recorded already, of this seed and system, is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from arguments import list_of, natural, one_of, positive
from csv_rows import read_rows, write_rows

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).parent / "results" / "systems.csv"
SYSTEMS = tuple(sorted(path.stem for path in (ROOT / "configs" / "demo").glob("*.yaml")))
METRICS = ("image -> text R@1", "text -> image R@1")


@dataclass(frozen=True)
class Figure:
    """One figure of one run."""

    date: str
    commit: str
    system: str
    seed: int
    pairs: int
    """Image-text pairs that it trained on."""
    cpu_s: float
    """CPU-seconds of the run, its loader and evaluation included."""
    split: str
    metric: str
    value: float
    chance: float


def main() -> int:
    """The exit code: 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=list_of(one_of(*SYSTEMS)), default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--seeds", type=list_of(natural), default=[0, 1, 2], help="values of run.seed")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--csv", type=Path, default=RECORD, help="where figures are recorded")
    parser.add_argument("--table", action="store_true", help="print the record as a table and run nothing")
    options = parser.parse_args()
    figures = read_rows(options.csv, Figure, parser.prog) if options.csv.exists() else []
    if options.table:
        print(markdown_table(figures))
        return 0
    done = {(figure.system, figure.seed) for figure in figures}
    runs = [(system, seed) for seed in options.seeds for system in options.systems if (system, seed) not in done]
    failed = []
    with ThreadPoolExecutor(options.jobs) as pool, Progress() as progress:
        task = progress.add_task("runs", total=len(runs))
        for (system, seed), found in zip(runs, pool.map(lambda run: measure(*run), runs), strict=True):
            progress.advance(task)
            if isinstance(found, str):
                failed.append(f"{system}, seed {seed}: {found}")
                continue
            figures = sorted([*figures, *found], key=lambda figure: (figure.system, figure.seed))
            write_rows(options.csv, Figure, figures)
    print(markdown_table(figures))
    print("\n".join(failed), file=sys.stderr)
    return int(bool(failed))


def measure(system: str, seed: int) -> list[Figure] | str:
    """Figures of a run in a folder of its own, or the end of what it said when it failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        command = [sys.executable, "-m", "scaleclip", "train", str(ROOT / "configs" / "demo" / f"{system}.yaml")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # one process a run, so that runs side by side have a core each
        command += [f"run.seed={seed}", f"run.folder={folder}", "data.workers=0"]
        timed = ["bash", "-c", 'TIMEFORMAT="%U %S"; time "$0" "$@"', *command]
        done = subprocess.run(timed, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr[-500:]
        cpu_s = sum(map(float, done.stderr.split()[-2:]))
        pairs = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["samples"]
        found = json.loads((folder / "results.json").read_text())["figures"]
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    about = (time.strftime("%Y-%m-%d"), git.stdout.strip(), system, seed, pairs, round(cpu_s, 1))
    return [Figure(*about, each["split"], each["metric"], each["value"], each["chance"]) for each in found]


def markdown_table(figures: list[Figure]) -> str:
    """A line a system, and in it for each split R@1 both ways in per cent, means over seeds with the lowest and the highest."""
    splits = sorted({figure.split for figure in figures})
    names = [system for system in SYSTEMS if any(figure.system == system for figure in figures)]
    titles = ["system", "seeds", "CPU-s", *(f"{split}: image -> text, text -> image" for split in splits)]
    lines = [f"| {' | '.join(titles)} |", f"|---|---|---|{'---|' * len(splits)}"]
    for system in names:
        of_it = [figure for figure in figures if figure.system == system]
        seeds, cpu_s = len({figure.seed for figure in of_it}), statistics.median(figure.cpu_s for figure in of_it)
        cells = [", ".join(_over_seeds(of_it, split, metric) for metric in METRICS) for split in splits]
        lines.append(f"| {system} | {seeds} | {cpu_s:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_seeds(figures: list[Figure], split: str, metric: str) -> str:
    values = [100 * figure.value for figure in figures if (figure.split, figure.metric) == (split, metric)]
    return f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    raise SystemExit(main())
