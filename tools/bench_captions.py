"""The rewriting job against plain loops of transformers' generate, on one model and the same captions.

  python tools/bench_captions.py --csv tools/results/captions_cpu.csv
  python tools/bench_captions.py --model FOLDER --device cuda --captions 2000 --batch 64

`job` is `scaleclip captions rewrite` from a tar to its files, without loading the model; `loop` is generate for one caption at
a time; `batches` is generate for batches in the captions' order. All stop at the line's end, are shown examples of the same
source and draw at the same temperature; the ways take turns, round after round. Without --model a small Llama that was taught
to end its lines for some seconds, so that texts have lengths of their own. On a CPU the seconds are the process's own, of one
thread; on a GPU they are those that pass.
"""

import argparse
import io
import json
import os
import shlex
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from arguments import file_with, positive
from csv_rows import read_rows, write_rows
from loss_bench.summary import About
from scaleclip.captioning.examples import load_sources
from scaleclip.captioning.generation import Sampling, end_tokens, pad_token
from scaleclip.captioning.job import Data, write_texts
from scaleclip.captioning.language_model import LanguageModel
from scaleclip.captioning.pretrained import folder_digest
from scaleclip.captioning.prompt import TASK, RewritePrompt
from scaleclip.captioning.rewrite import Rewriting
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.source import open_shards
from scaleclip.distributed import World
from tiny_captioners import demo_captions, tiny_llama

SOURCE, LEAST_TIMES = "human", 2.0


@dataclass(frozen=True)
class Row:
    """A way, measured."""

    date: str
    commit: str
    command: str
    machine: str
    torch: str
    load: float
    device: str
    model: str
    parameters: int
    captions: int
    batch: int
    max_tokens: int
    way: str
    clock: str
    """`processor` or `wall`: whose seconds."""
    rounds: int
    texts_per_s_min: float
    texts_per_s_p50: float
    texts_per_s_max: float
    tokens_per_s_p50: float
    times_loop: float
    """Texts a second against the loop's, medians."""


class Measured(list[tuple[float, int]]):
    """(seconds, tokens made) of each round."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where the job is not as many times faster than the loop as it should be."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    on_cpu = options.device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    if on_cpu:
        torch.set_num_threads(1)
    with TemporaryDirectory(prefix="bench_captions-") as name:
        folder = Path(name)
        captions = demo_captions(options.captions)
        # the demo's captions are short and alike; the web's are not
        captions = [", ".join([caption, *captions[: place % 7]]) for place, caption in enumerate(captions)]
        made = options.model or tiny_llama(
            folder / "small-llama",
            lines=demo_captions(),
            steps=options.steps,
            width=options.width,
            layers=options.layers,
            heads=4,
        )
        model = LanguageModel(made, "auto", torch.device(options.device))
        ways = _ways(model, made, captions, options, folder)
        found = {way: Measured() for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                begun_s = clock()
                tokens = run()
                found[way].append((clock() - begun_s, tokens))
        parameters = sum(parameter.numel() for parameter in model.model.parameters())
    about = About.now(shlex.join(["python", "tools/bench_captions.py", *arguments]), options.rounds, repeats=1)
    rows = [_row(way, found, parameters, options, about) for way in ways]
    _show(rows)
    if options.csv:
        known = read_rows(options.csv, Row, "tools/bench_captions.py") if options.csv.exists() else []
        same = {(row.way, row.device, row.model, row.batch) for row in rows}
        write_rows(
            options.csv, Row, [*(row for row in known if (row.way, row.device, row.model, row.batch) not in same), *rows]
        )
    times = next(row.times_loop for row in rows if row.way == "job")
    print(f"the job is {times:.1f} times as fast as the loop, and should be {LEAST_TIMES:.0f} times at least")
    return int(times < LEAST_TIMES)


def _ways(
    model: LanguageModel, folder: Path, captions: Sequence[str], options: argparse.Namespace, work: Path
) -> dict[str, Callable[[], int]]:
    """Each rewrites all captions and tells how many tokens that took."""
    sampling, examples = Sampling(max_tokens=options.max_tokens), load_sources([SOURCE])
    prompt = RewritePrompt(TASK, model)
    shown = examples[0].draw(0)
    ends = end_tokens(model.model, model.tokenizer)
    config = GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, max_new_tokens=sampling.max_tokens,
        eos_token_id=ends or None, pad_token_id=pad_token(model.tokenizer, ends), stop_strings="\n",
    )  # fmt: skip
    tar = _write_tar(work / "captions.tar", captions)
    number = iter(range(1_000_000))

    def job() -> int:
        out = work / f"out-{next(number)}"
        data = Data(*open_shards("--data", (str(tar),), None, ShardCache(CacheConfig(folder=str(work / "cache")))))
        task = Rewriting(model, str(folder), folder_digest(folder), examples, TASK, sampling, batch=options.batch)
        return write_texts(task, data, out, World(0, 1, 0, model.model.device), lambda news: None).whole.tokens

    def plain(size: int) -> int:
        torch.manual_seed(0)
        tokens = 0
        for start in range(0, len(captions), size):
            rows = [[*prompt.prefix(shown), *prompt.ending(caption)] for caption in captions[start : start + size]]
            longest = max(map(len, rows))
            ids = torch.tensor([[config.pad_token_id] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            device: Any = model.model.device
            with torch.inference_mode():
                made = model.model.generate(
                    ids.to(device), attention_mask=mask.to(device), generation_config=config, tokenizer=model.tokenizer
                )[:, longest:]
            for row in made.tolist():
                model.tokenizer.decode(row, skip_special_tokens=True)
                tokens += sum(token != config.pad_token_id for token in row)
        return tokens

    return {"loop": lambda: plain(1), "batches": lambda: plain(options.batch), "job": job}


def _write_tar(path: Path, captions: Sequence[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(captions):
            content = caption.encode()
            member = tarfile.TarInfo(f"{number:09d}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"successes": len(captions)}))
    return path


def _row(way: str, found: dict[str, Measured], parameters: int, options: argparse.Namespace, about: About) -> Row:
    rates = sorted(options.captions / seconds for seconds, _ in found[way])
    loop = statistics.median(options.captions / seconds for seconds, _ in found["loop"])
    tokens = statistics.median(tokens / seconds for seconds, tokens in found[way])
    return Row(
        about.date, about.commit, about.command, about.cpu, about.torch, about.load, options.device,
        str(options.model or f"Llama {options.layers} x {options.width}"), parameters, options.captions, options.batch,
        options.max_tokens, way, "processor" if options.device == "cpu" else "wall", options.rounds, round(rates[0], 3),
        round(statistics.median(rates), 3), round(rates[-1], 3), round(tokens, 1), round(statistics.median(rates) / loop, 3),
    )  # fmt: skip


def _show(rows: Sequence[Row]) -> None:
    table = Table("way", "texts/s, median (spread)", "tokens/s", "times the loop")
    for row in rows:
        spread = f"{row.texts_per_s_p50:,.1f} ({row.texts_per_s_min:,.1f}-{row.texts_per_s_max:,.1f})"
        table.add_row(row.way, spread, f"{row.tokens_per_s_p50:,.0f}", f"{row.times_loop:.2f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if os.getloadavg()[0] > 0.5:
        print(f"the load average is {os.getloadavg()[0]:.2f}: other processes slow these", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal language model; none: a small Llama")
    parser.add_argument("--width", type=positive, default=256, help="of the small Llama (default: 256)")
    parser.add_argument("--layers", type=positive, default=6, help="of the small Llama (default: 6)")
    parser.add_argument("--steps", type=positive, default=40, help="that the small Llama is taught for (default: 40)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--captions", type=positive, default=64, help="(default: 64)")
    parser.add_argument("--batch", type=positive, default=32, help="(default: 32)")
    parser.add_argument("--max-tokens", type=positive, default=77, help="(default: 77)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: 3)")
    parser.add_argument("--csv", type=file_with(".csv"), metavar="PATH", help="measuring again replaces rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
