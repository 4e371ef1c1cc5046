"""Run the demo for several seeds and record what it reached: a row a figure in tools/results/demo.csv.

python tools/measure_demo.py --seeds 0 1 2            train, evaluate, record (a few minutes a seed)
python tools/measure_demo.py --table                  print the recorded figures as the README's table
"""

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.progress import track

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).parent / "results" / "demo.csv"
FIELDS = (
    "date",
    "commit",
    "cpu",
    "ranks",
    "seed",
    "wall_s",
    "train_s",
    "data_wait",
    "split",
    "metric",
    "value",
    "chance",
    "majority",
)
TABLE_METRICS = ("image -> text R@1", "image -> text R@5", "text -> image R@1", "text -> image R@5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="values of run.seed")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--table", action="store_true", help="print the table of the newest record instead")
    parser.add_argument(
        "overrides", nargs="*", help="dotted overrides of configs/demo.yaml; such runs are printed, not recorded"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown_table(read_record()))
        return
    rows = [row for seed in track(arguments.seeds, "seeds") for row in measure(seed, arguments.ranks, arguments.overrides)]
    if not arguments.overrides:
        keep = [row for row in read_record() if int(row["ranks"]) != arguments.ranks]
        with RECORD.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows([*keep, *rows])
    print(markdown_table(rows))


def measure(seed: int, ranks: int, overrides: list[str]) -> list[dict[str, Any]]:
    """One run of the demo in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "demo"
        command = [sys.executable, "-m", "scaleclip", "demo", "--ranks", str(ranks), f"run.seed={seed}", f"run.folder={folder}"]
        start = time.perf_counter()
        subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)
        return rows_of(folder, seed, ranks, time.perf_counter() - start)


def rows_of(folder: Path, seed: int, ranks: int, wall_s: float) -> list[dict[str, Any]]:
    """A finished run as rows of the record."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = json.loads((folder / "results.json").read_text())["figures"]
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git.stdout.strip(),
        "cpu": cpu_name(),
        "ranks": ranks,
        "seed": seed,
        "wall_s": round(wall_s),
        "train_s": round(steps[-1]["train_s"]),
        "data_wait": round(statistics.median(step["data_wait"] for step in steps), 4),
    }
    return [about | figure for figure in figures]


def cpu_name() -> str:
    """The processor's name and the number of its cores that this process may use."""
    names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def read_record() -> list[dict[str, Any]]:
    """The recorded rows."""
    if not RECORD.exists():
        return []
    with RECORD.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Mean and range over seeds, one line a split and number of ranks."""
    lines = [
        "| split | ranks | seeds | image -> text R@1 / R@5 | text -> image R@1 / R@5 | chance | zero-shot, chance, majority |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((str(row["split"]), str(row["ranks"])), []).append(row)
    for (split, ranks), group in groups.items():
        values = {metric: [100 * float(r["value"]) for r in group if r["metric"] == metric] for metric in TABLE_METRICS}
        chance = {r["metric"]: 100 * float(r["chance"]) for r in group}
        cells = [f"{statistics.mean(v):.1f} ({min(v):.1f}-{max(v):.1f})" for v in values.values()]
        seeds = len({r["seed"] for r in group})
        tasks = dict.fromkeys(r["metric"] for r in group if r["metric"].startswith("zero-shot"))
        zero_shot = []
        for task in tasks:
            of_task = [r for r in group if r["metric"] == task]
            mean = statistics.mean(100 * float(r["value"]) for r in of_task)
            majority = 100 * float(of_task[0]["majority"])
            zero_shot.append(f"{task.removeprefix('zero-shot ')} {mean:.1f}, {chance[task]:.1f}, {majority:.1f}")
        chances = f"{chance[TABLE_METRICS[0]]:.2f} / {chance[TABLE_METRICS[1]]:.2f}"
        line = [split, ranks, str(seeds), " / ".join(cells[:2]), " / ".join(cells[2:]), chances, "; ".join(zero_shot)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
