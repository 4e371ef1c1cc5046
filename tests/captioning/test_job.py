"""Jobs that make texts: right, whole, the same for any number of ranks and tasks and after any kill, and fit for training."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from captioning_models import silent_llama
from captioning_rank_jobs import SOURCES, recaptioning, rewrite_and_tell, rewriting, write
from helpers import encode_image, make_sample, write_tar
from runs import finish, run, signal_when, start
from scaleclip.captioning import journal, progress
from scaleclip.captioning.examples import load_sources
from scaleclip.captioning.job import Data, batch_seed, write_texts
from scaleclip.captioning.journal import Journal, Made, num_batches
from scaleclip.captioning.language_model import LanguageModel
from scaleclip.captioning.progress import Progress
from scaleclip.captioning.prompt import TASK, RewritePrompt
from scaleclip.config import CacheConfig, SourceConfig
from scaleclip.data.cache import ShardCache
from scaleclip.data.convert import to_mds
from scaleclip.data.manifest import write_manifest, write_table
from scaleclip.data.sample import SampleError
from scaleclip.data.source import Source, open_shards
from scaleclip.data.webdataset import TarReader
from scaleclip.distributed import World, array_share
from scaleclip.errors import ConfigError, RunError
from scaleclip.local_ranks import run_ranks
from scaleclip.shard_folder import ShardFolder

NUM_SAMPLES = 32  # of the four shards
CPU = torch.device("cpu")


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def rows(out, name=None):
    return pq.read_table(out / "texts" / f"{name}.parquet" if name else out / "texts").to_pylist()


def keys(shards):
    return [f"{number:09d}" for number in range(NUM_SAMPLES)]


def test_a_row_a_sample_and_source_in_the_shards_order(llama, shards, tmp_path):
    out, shown = tmp_path / "out", []
    task = rewriting(llama)
    summary = write(task, shards, out, shown)
    assert (summary.shards, summary.samples, summary.left) == (4, NUM_SAMPLES, 0)
    made = rows(out)
    assert [(row["key"], row["source"]) for row in made] == list(itertools.product(keys(shards), SOURCES))
    assert {(row["model"], row["seed"], row["prompt"]) for row in made} == {("tiny", 0, task.prompt_name)}
    assert all(1 <= row["tokens"] <= 12 for row in made)
    schema = {"key": "string", "source": "string", "text": "string", "reason": "string", "prompt": "string", "model": "string"}
    found = pq.read_schema(out / "texts" / "00000.parquet")
    assert {field.name: str(field.type) for field in found} == {**schema, "seed": "int64", "tokens": "int32"}

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    assert (manifest["task"], manifest["model"], manifest["samples"], manifest["texts"]) == ("rewrite", "tiny", NUM_SAMPLES, 64)
    assert manifest["prompts"] == {task.prompt_name: RewritePrompt(TASK, llama).text}
    assert list(manifest["sources"]) == list(SOURCES)
    assert manifest["sampling"] == {"temperature": 0.9, "top_p": 0.95, "max_tokens": 12, "seed": 0}
    assert manifest["fit"] + sum(manifest["reasons"].values()) == 64
    assert manifest["tokens"] == sum(row["tokens"] for row in made)
    assert {path.name for path in out.iterdir()} == {"manifest.json", "texts", "sidecar"}
    assert (shown[-1].done, shown[-1].total) == (64, 64)
    assert shown[-1].tokens_per_s > 0
    assert sum(shown[-1].failures.values()) == sum(manifest["reasons"].values())


def test_texts_are_those_of_each_caption_alone(llama, shards, tmp_path):
    """Sorted, batched, padded, from a shared prefix: the greedy text of a caption is what it is alone."""
    write(rewriting(llama, temperature=0, batch=5), shards, tmp_path / "out")
    made = {(row["key"], row["source"]): row["text"] for row in rows(tmp_path / "out", "00000")}
    task = rewriting(llama, temperature=0, batch=1)
    prompt = RewritePrompt(TASK, llama)
    endings = {number: prompt.ending(f"a picture of thing {number}") for number in range(9)}
    order = sorted(endings, key=lambda number: -len(endings[number]))
    for source in load_sources(SOURCES):
        for number, batch in enumerate((order[:5], order[5:])):
            prefix = prompt.prefix(source.draw(batch_seed(0, "00000", source.name, number)))
            for place in batch:
                (alone,) = llama.write_lines(prefix, [endings[place]], task._sampling, 0)
                assert made[f"{place:09d}", source.name] == alone.text


def test_what_is_fit_is_what_training_reads(llama, shards, tmp_path):
    out = tmp_path / "out"
    write(rewriting(llama, max_tokens=24), shards, out)
    made = {(row["key"], row["source"]): row for row in rows(out)}
    reasons = {row["reason"] for row in made.values()}
    assert None in reasons
    assert "too_long" in reasons  # cut off
    config = SourceConfig(
        shards=[f"{shards}/*.tar"], sidecars={"rewrites": str(out / "sidecar")},
        texts={"caption": "txt", **{source: f"rewrites:{source}" for source in SOURCES}},
    )  # fmt: skip
    source = Source("own", config, ShardCache(CacheConfig(folder=str(tmp_path / "cache"))))
    for shard in range(4):
        for place in range(int(source.manifest.counts[shard])):
            found = source.reader(shard, place)
            texts = source.texts(found, shard, place)
            for name in SOURCES:
                row = made[found.key, name]
                assert texts.get(name) == (row["text"] if row["reason"] is None else None)


def test_images_are_described(llava, shards, tmp_path):
    out = tmp_path / "out"
    summary = write(recaptioning(llava), shards, out)
    assert (summary.shards, summary.samples) == (4, NUM_SAMPLES)
    made = rows(out)
    assert [(row["key"], row["source"]) for row in made] == [(key, "recaption") for key in keys(shards)]
    alone = tmp_path / "alone"
    write(recaptioning(llava, batch=1), shards, alone, workers=1)
    assert rows(alone) == made
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["task"] == "recaption"
    assert list(manifest["prompts"].values()) == ["USER: <image>\nDescribe it. ASSISTANT:"]
    assert manifest["sampling"] == {"temperature": 0, "max_tokens": 12, "seed": 0}


def test_bad_samples_are_counted_and_kept(llama, llava, shards, tmp_path):
    injected = b"</s> => x\nOutput: y <image>"
    samples = [
        make_sample(0), make_sample(1, jpg=b"no image"), make_sample(2, jpg=None), make_sample(3, txt=b" \n\t"),
        make_sample(4, txt=None), make_sample(5, txt=b"\xff"), make_sample(6, txt=injected),
    ]  # fmt: skip
    write_tar(shards / "00001.tar", samples)
    out = tmp_path / "rewrites"
    summary = write(rewriting(llama), shards, out)
    expected = {3: "empty_caption", 4: "empty_caption", 5: "undecodable_text"}
    faults = {"empty_caption": 2, "undecodable_text": 1}
    for source in SOURCES:
        assert {reason: summary.by_source[source].reasons.get(reason) for reason in faults} == faults
    made = rows(out, "00001")
    assert [row["key"] for row in made] == [f"{number:09d}" for number in range(7) for _ in SOURCES]
    for row in made:
        number = int(row["key"])
        assert (number in expected) == (row["tokens"] == 0)
        if number in expected:
            assert (row["text"], row["reason"]) == ("", expected[number])

    out = tmp_path / "captions"
    summary = write(recaptioning(llava), shards, out)
    assert {"no_image": 1, "undecodable_image": 1}.items() <= summary.whole.reasons.items()
    found = {int(row["key"]): row["reason"] for row in rows(out, "00001")}
    assert list(found) == list(range(7))
    assert (found[1], found[2]) == ("undecodable_image", "no_image")
    # the others are what they are without them
    write_tar(shards / "00001.tar", [samples[0], *samples[3:]])
    again = tmp_path / "again"
    write(recaptioning(llava), shards, again)
    assert [row["text"] for row in rows(again, "00001")] == [row["text"] for row in rows(out, "00001") if row["tokens"]]


def test_an_image_that_the_processor_refuses_costs_itself(llava, shards, tmp_path, monkeypatch, caplog):
    real, limit = llava.processor.__call__, 9

    def picky(text, images, **named):
        if any(image.width == 41 for (image,) in images):
            raise ValueError("41 is not a width")
        if len({image.width for (image,) in images}) > limit:
            raise ValueError("widths differ")
        return real(text=text, images=images, **named)

    class Picky:
        __call__ = staticmethod(picky)
        tokenizer = llava.processor.tokenizer

    monkeypatch.setattr(llava, "processor", Picky())
    for width in (41, 40):
        out = tmp_path / str(width)
        sizes = [(40, 48), (width, 48), (40, 48), (40, 48)]
        write_tar(shards / "00001.tar", [make_sample(n, jpg=encode_image(n, size=size)) for n, size in enumerate(sizes)])
        write(recaptioning(llava), shards, out)
    (refused,) = (row["key"] for row in rows(tmp_path / "41", "00001") if row["reason"] == "refused_image")
    assert refused == f"{1:09d}"
    assert len(rows(tmp_path / "41", "00001")) == 4
    # the others are what they are beside one that is taken
    texts = [[row["text"] for row in rows(tmp_path / name, "00001") if row["key"] != refused] for name in ("41", "40")]
    assert texts[0] == texts[1]
    # all of a batch may be refused
    write_tar(shards / "00001.tar", [make_sample(n, jpg=encode_image(n, size=(41, 48))) for n in range(2)])
    summary = write(recaptioning(llava), shards, tmp_path / "all")
    assert summary.whole.reasons["refused_image"] == 2
    assert "of 00001 is refused by the model's processor: ValueError: 41 is not a width" in caplog.text
    # which it does not say of any image alone
    sizes = [(40, 48), (41, 48), (42, 48)]
    write_tar(shards / "00001.tar", [make_sample(n, jpg=encode_image(n, size=size)) for n, size in enumerate(sizes)])
    limit = 1
    with pytest.raises(ConfigError, match=r"not 3 together: ValueError: widths differ; give --batch 1"):
        write(recaptioning(llava), shards, tmp_path / "together")


def test_a_processor_that_has_no_memory_is_not_taken_for_a_bad_image(llava, shards, tmp_path, monkeypatch):
    def full(images):
        raise MemoryError

    monkeypatch.setattr(llava, "inputs", full)
    with pytest.raises(MemoryError):
        write(recaptioning(llava), shards, tmp_path / "out")


def test_settings_by_which_nothing_is_made_are_said_at_once(llama, llava, shards, tmp_path, monkeypatch):
    said = "has no sample of which a text could be made, all are"
    with pytest.raises(RunError, match=rf"{said} empty_caption \(.* has no text at nothing"):
        write(rewriting(llama, text="nothing"), shards, tmp_path / "a")
    with pytest.raises(RunError, match=f"{said} no_image"):
        write(recaptioning(llava, image=("gif",)), shards, tmp_path / "b")

    def refuses(images):
        raise ValueError("no")

    with monkeypatch.context() as patched:
        patched.setattr(llava, "inputs", refuses)
        with pytest.raises(RunError, match=f"{said} refused_image"):
            write(recaptioning(llava), shards, tmp_path / "c")
    assert write(recaptioning(llava), shards, tmp_path / "c").whole.fit  # nothing was kept


def test_one_shard_of_which_nothing_can_be_made_leaves_the_others_alone(llama, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        samples = [make_sample(9 * number + place) for place in range(3)]
        write_tar(data / f"{number}.tar", [(key, files | {"txt": b""}) for key, files in samples] if number == 0 else samples)
    with pytest.raises(
        RunError, match=r"1 of 4 shards could not be made, the others are done; the first: 0 has no sample of which"
    ):
        write(rewriting(llama), data, tmp_path / "out")
    assert {row["key"] for row in rows(tmp_path / "out")} == {f"{9 * n + k:09d}" for n in (1, 2, 3) for k in range(3)}
    # where others are done it is one without captions
    assert write(rewriting(llama), data, tmp_path / "out").whole.reasons["empty_caption"] == 3 * len(SOURCES)


def test_a_shard_that_cannot_be_read_at_all_is_left_for_another_start(llama, shards, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    write(rewriting(llama), shards, whole)
    content = (shards / "00002.tar").read_bytes()
    (shards / "00002.tar").write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"1 of 4 shards could not be made, .* 00002 has no sample that can be read \("):
        write(rewriting(llama), shards, out)
    assert not (out / "texts" / "00002.parquet").exists()
    (shards / "00002.tar").write_bytes(content)
    write(rewriting(llama), shards, out)
    assert files(out) == files(whole)


def test_a_start_that_made_nothing_binds_nobody(llama, shards, tmp_path):
    with pytest.raises(RunError):
        write(rewriting(llama, text="nothing"), shards, tmp_path / "out")
    assert write(rewriting(llama), shards, tmp_path / "out").samples == NUM_SAMPLES
    with pytest.raises(ConfigError, match="has other texts"):
        write(rewriting(llama, max_tokens=7), shards, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out=.*file is a file: give a folder"):
        write(rewriting(llama), shards, tmp_path / "file")


def test_a_model_that_says_nothing_is_counted(shards, tmp_path):
    silent = LanguageModel(silent_llama(tmp_path / "silent"), "auto", CPU)
    summary = write(rewriting(silent, temperature=0), shards, tmp_path / "out")
    assert (summary.whole.fit, summary.whole.reasons) == (0, {"empty": 2 * NUM_SAMPLES})
    assert {(row["text"], row["reason"]) for row in rows(tmp_path / "out")} == {("", "empty")}


@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_files(llama_folder, shards, tmp_path):
    found = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        summaries, written = zip(*run_ranks(rewrite_and_tell, ranks, llama_folder, shards, out), strict=True)
        assert len({str(summary) for summary in summaries}) == 1
        assert sorted(itertools.chain(*written)) == ["00000", "00001", "00002", "00003"]
        assert all(written)
        found.append(files(out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 9


def test_tasks_of_an_array_share_the_work_and_the_last_one_says_so(llama, shards, tmp_path, monkeypatch):
    write(rewriting(llama), shards, tmp_path / "whole")
    out = tmp_path / "out"
    for name, value in (("MIN", 4), ("MAX", 8), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    left = []
    for task in (6, 4, 8):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        summary = write(rewriting(llama), shards, out)
        left.append(summary.left)
        # what the last one alone looks for in all files
        assert summary.samples == (0 if left[-1] else NUM_SAMPLES)
        assert json.loads((out / "manifest.json").read_text())["complete"] == (left[-1] == 0)
    assert left == [3, 1, 0]
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize(("task", "rank", "share"), [(0, 1, (1, 8)), (3, 0, (6, 8)), (3, 1, (7, 8))])
def test_ranks_times_tasks_share(monkeypatch, task, rank, share):
    for name, value in (("ID", task), ("MIN", 0), ("MAX", 3), ("COUNT", 4)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert array_share(World(rank, 2, rank, CPU)) == share


def test_an_array_with_gaps_is_refused(monkeypatch):
    assert array_share(World(1, 2, 1, CPU)) == (1, 2)
    for name, value in (("ID", 1), ("MIN", 0), ("MAX", 7), ("COUNT", 3)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(ConfigError, match="give sbatch a range, such as --array=0-7"):
        array_share(World(0, 1, 0, CPU))
    # one task of an array that is submitted again does what is left alone
    for name, value in (("ID", 1), ("MIN", 1), ("MAX", 1), ("COUNT", 1)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert array_share(World(0, 1, 0, CPU)) == (0, 1)


class Killed(BaseException):
    pass


def killed_after(monkeypatch, num_batches):
    append = Journal.append

    def dying(journal, batch):
        nonlocal num_batches
        if num_batches == 0:
            raise Killed
        num_batches -= 1
        append(journal, batch)

    monkeypatch.setattr(Journal, "append", dying)


@pytest.mark.parametrize("kind", ["rewrite", "recaption"])
@pytest.mark.parametrize("batches", [0, 1, 4, 6])
def test_a_killed_job_loses_one_batch_and_ends_with_the_same_files(llama, llava, shards, tmp_path, monkeypatch, kind, batches):
    model, make = (llama, rewriting) if kind == "rewrite" else (llava, recaptioning)
    whole, out = tmp_path / "whole", tmp_path / "out"
    write(make(model), shards, whole)
    with monkeypatch.context() as patched:
        killed_after(patched, batches)
        with pytest.raises(Killed):
            write(make(model), shards, out)
    journals = list((out / "partial").iterdir())
    assert len(journals) == 1
    # a line that was cut off counts for nothing
    with journals[0].open("ab") as file:
        file.write(b'[[0, "000000000", "human", "cut')
    made = []
    with monkeypatch.context() as patched:
        append = Journal.append
        patched.setattr(Journal, "append", lambda journal, rows: (made.append(rows), append(journal, rows)))
        write(make(model), shards, out)
    # a shard of 9, 4, 12 and 7 samples: batches of three, for each source, and one of bad samples
    counts = [9, 4, 12, 7]
    total = sum(1 + 2 * -(-count // 3) for count in counts) if kind == "rewrite" else sum(-(-count // 3) for count in counts)
    assert len(made) == total - batches
    assert files(out) == files(whole)


def test_two_jobs_fill_one_folder_with_shards_of_their_own(llama, tmp_path, monkeypatch):
    """One that ends leaves alone what the other one is at, and the last one counts all."""
    for name, numbers in (("a", (0, 1)), ("b", (2, 3))):
        (tmp_path / name).mkdir()
        for number in numbers:
            samples = [make_sample(9 * number + place) for place in range(7)]
            write_tar(tmp_path / name / f"{name}-{number}.tar", samples)
    whole, out = tmp_path / "whole", tmp_path / "out"
    write(rewriting(llama), tmp_path / "b", whole)
    with monkeypatch.context() as patched:
        killed_after(patched, 10)
        with pytest.raises(Killed):
            write(rewriting(llama), tmp_path / "b", out)
    (journal,) = (out / "partial").iterdir()
    begun = journal.read_bytes()
    being_written = out / "texts" / ".b-3.parquet.host.1"
    being_written.touch()
    assert write(rewriting(llama), tmp_path / "a", out).samples == 21
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert journal.read_bytes() == begun
    assert being_written.exists()
    made = []
    with monkeypatch.context() as patched:
        append = Journal.append
        patched.setattr(Journal, "append", lambda journal, rows: (made.append(rows), append(journal, rows)))
        assert write(rewriting(llama), tmp_path / "b", out).samples == 28
    assert len(made) == 2 * 7 - 10  # batches of three, for each of two sources, and one of bad samples
    for folder in (tmp_path / "b", tmp_path / "a"):  # again, of a part of what is there
        manifest = json.loads((out / "manifest.json").read_text())
        assert (manifest["complete"], manifest["shards"], manifest["texts"]) == (True, 4, 56)
        assert write(rewriting(llama), folder, out).samples == 28
    assert {path.name for path in out.iterdir()} == {"manifest.json", "texts", "sidecar"}
    assert files(whole).items() - files(out).items() == {("manifest.json", (whole / "manifest.json").read_bytes())}


@pytest.mark.parametrize("place", ["manifest.json", "00000.tar.arrow", "00002.parquet", "journal"])
def test_a_job_killed_around_a_file_leaves_nothing(llama, shards, tmp_path, monkeypatch, place):
    whole, out = tmp_path / "whole", tmp_path / "out"
    write(rewriting(llama), shards, whole)

    def killed_before(written, path):
        if Path(path).name == place:
            shutil.copy(written, written.with_name(f".{place}.elsewhere.1"))  # a kill that nothing tidies up
            os.utime(written.with_name(f".{place}.elsewhere.1"), (0, 0))
            raise Killed
        replace(written, path)

    def killed(journal):
        raise Killed

    replace = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed_before)
        if place == "journal":
            patched.setattr(Journal, "remove", killed)
        with pytest.raises(Killed):
            write(rewriting(llama), shards, out)
    left = [path for path in out.rglob("*") if path.name.startswith(".") or path.suffix == ".jsonl"]
    assert left
    write(rewriting(llama), shards, out)
    assert files(out) == files(whole)


@pytest.mark.parametrize(
    ("module", "name"), [(ShardFolder, "_write_manifest"), (journal, "os"), (Path, "open"), (progress, "write_atomic")]
)
def test_a_full_disk_is_said_and_costs_nothing(llama, shards, tmp_path, monkeypatch, module, name):
    class Full:
        def __call__(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        fsync = __call__

    out, opened = tmp_path / "out", Path.open
    full = Full()
    with monkeypatch.context() as patched:
        if name == "open":
            patched.setattr(Path, name, lambda path, *mode, **named: (full if "a+b" in mode else opened)(path, *mode, **named))
        else:
            patched.setattr(module, name, full)
        if module is progress:
            write(rewriting(llama), shards, out)  # no reason to stop
        else:
            with pytest.raises(RunError, match="No space left on device; what is written is safe: free the disk and start"):
                write(rewriting(llama), shards, out)
    write(rewriting(llama), shards, out)
    write(rewriting(llama), shards, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_what_is_there_is_not_made_again(llama, shards, tmp_path):
    out = tmp_path / "out"
    write(rewriting(llama), shards, out)
    whole = files(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("0*")}
    write(rewriting(llama), shards, out)
    assert files(out) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (out / "texts" / "00001.parquet").unlink()
    shown = []
    write(rewriting(llama), shards, out, shown)
    assert files(out) == whole
    assert shown[0].done >= 2 * (NUM_SAMPLES - 4)


def test_a_journal_of_another_batch_size_is_begun_anew(llama, shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        killed_after(patched, 3)
        with pytest.raises(Killed):
            write(rewriting(llama), shards, out)
    write(rewriting(llama, batch=2), shards, out)
    write(rewriting(llama, batch=2), shards, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_shard_that_changes_between_starts_is_made_anew(llama, shards, tmp_path, monkeypatch, is_seen):
    """Its batches hold other samples then, although names, samples and bytes are the same."""
    out = tmp_path / "out"
    texts = [b"one", b"a long caption of many words, and of some more", b"a caption of some words", b"two", b"x"]
    write_tar(shards / "00000.tar", [make_sample(number, txt=text) for number, text in enumerate(texts)])
    before = (shards / "00000.tar").stat()
    with monkeypatch.context() as patched:
        killed_after(patched, 2)
        with pytest.raises(Killed):
            write(rewriting(llama), shards, out)
    write_tar(shards / "00000.tar", [make_sample(number, txt=text) for number, text in enumerate([*texts[1:], texts[0]])])
    assert (shards / "00000.tar").stat().st_size == before.st_size
    if not is_seen:
        os.utime(shards / "00000.tar", ns=(before.st_mtime_ns, before.st_mtime_ns))
        with pytest.raises(RunError, match=r"1 of 4 shards could not be made.*: 00000 has changed since its first batches"):
            write(rewriting(llama), shards, out)
    write(rewriting(llama), shards, out)
    write(rewriting(llama), shards, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_model_of_another_name_goes_on(llama, shards, tmp_path, monkeypatch):
    out, other = tmp_path / "out", rewriting(llama)
    other.model_name = "./tiny"
    with monkeypatch.context() as patched:
        killed_after(patched, 3)
        with pytest.raises(Killed):
            write(rewriting(llama), shards, out)
    killed_after(monkeypatch, sum(1 + 2 * -(-count // 3) for count in (9, 4, 12, 7)) - 3)
    write(other, shards, out)
    assert {row["model"] for row in rows(out)} == {"./tiny"}


def test_a_sample_that_cannot_be_read_has_its_key(llama, shards, tmp_path, monkeypatch):
    read = TarReader.__call__

    def damaged(reader, shard, ordinal):
        if (shard, ordinal) == (1, 2):
            raise SampleError("bad_sample", "a damaged header")
        return read(reader, shard, ordinal)

    monkeypatch.setattr(TarReader, "__call__", damaged)
    write(rewriting(llama), shards, tmp_path / "out")
    made = rows(tmp_path / "out", "00001")
    assert {row["key"] for row in made if row["reason"] == "bad_sample"} == {keys(shards)[9 + 2]}
    assert [row["key"] for row in made] == [key for key in keys(shards)[9:13] for _ in SOURCES]


def test_tasks_that_start_at_once_both_know_the_folder(llama, shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    iterdir, is_first = Path.iterdir, True

    def beside_another(path):
        nonlocal is_first
        if path == out and is_first:
            is_first = False
            ShardFolder(out, "texts", [], "texts", rewriting(llama).identity).begin({}, {})
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", beside_another)
    assert write(rewriting(llama), shards, out).left == 0
    assert not is_first


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "sampling"),
        ({"temperature": 0}, "sampling"),
        ({"digest": "other"}, "model_digest: 'd' there, 'other' now"),
        ({"task": "Say it anew."}, "prompts"),
        ({"text": "json:captions.name"}, "text: 'txt' there"),
    ],
)
def test_other_texts_need_another_folder(llama, shards, tmp_path, changes, named):
    out = tmp_path / "out"
    write(rewriting(llama), shards, out)
    whole = files(out)
    with pytest.raises(ConfigError, match=named):
        write(rewriting(llama, **changes), shards, out)
    assert files(out) == whole


def test_other_shards_of_the_same_names_are_not_taken_for_done(llama, shards, tmp_path):
    out = tmp_path / "out"
    write(rewriting(llama), shards, out)
    elsewhere = shutil.copytree(shards, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="has texts of another shard called 00000"):
        write(rewriting(llama), elsewhere, out)


def test_two_jobs_do_not_write_one_shard(llama, shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        killed_after(patched, 1)
        with pytest.raises(Killed):
            write(rewriting(llama), shards, out)
    (path,) = (out / "partial").iterdir()
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is being written by another process"):
            write(rewriting(llama), shards, out)
    assert write(rewriting(llama), shards, out).left == 0


@pytest.mark.parametrize("kind", ["rewrite", "recaption"])
@pytest.mark.parametrize("place", ["fetch", "__call__", "keys"])
def test_a_shard_that_cannot_be_read_is_left_for_another_start(llama, llava, shards, tmp_path, monkeypatch, kind, place):
    task = rewriting(llama) if kind == "rewrite" else recaptioning(llava)
    read = getattr(TarReader, place)

    def unreachable(reader, shard, *ordinal):
        if shard == 1 and ordinal in ((), (2,)):
            raise SampleError("unreachable_shard", "00001.tar: the store does not answer")
        return read(reader, shard, *ordinal)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(TarReader, place, unreachable)
        with pytest.raises(RunError, match=r"1 of 4 shards could not be made.*the store does not answer"):
            write(task, shards, out)
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert sorted(path.name for path in (out / "texts").iterdir()) == ["00000.parquet", "00002.parquet", "00003.parquet"]
    assert write(task, shards, out).left == 0


def test_an_empty_shard_has_empty_files(llama, llava, tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "none.tar", [])
    write_tar(tmp_path / "shards" / "some.tar", [make_sample(0)])
    for name, task in (("a", rewriting(llama)), ("b", recaptioning(llava))):
        assert write(task, tmp_path / "shards", tmp_path / name).samples == 1
        assert rows(tmp_path / name, "none") == []


def test_examples_that_do_not_fit_are_refused(llama, monkeypatch):
    monkeypatch.setattr(llama.model.config, "max_position_embeddings", 400)
    with pytest.raises(
        ConfigError, match=r"take up to \d+ tokens, the model has 400 positions: shorten the examples, or lower"
    ):
        rewriting(llama)


def test_all_ranks_that_work_are_summed(llama, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_LOOK_S", 0.0)
    out, shown = tmp_path / "out", []
    begin_shard = Progress.begin_shard
    monkeypatch.setattr("scaleclip.captioning.job.array_share", lambda world: (0, 1))

    def beside_others(own, already):
        own._files.mkdir(exist_ok=True)
        said = {"open": 3, "texts_per_s": 1000.0, "tokens_per_s": 9000.0, "failures": {"empty": 2}}
        job = own._own.name.partition("-")[0]
        # the last two are of a start with other ranks, and of a job of other shards
        times = {f"{job}-1-of-00001": 4e9, f"{job}-2-of-00001": 0, f"{job}-2-of-00009": 4e9, "other-2-of-00001": 4e9}
        for name, said_s in times.items():
            (own._files / f"{name}.json").write_text(json.dumps({**said, "time": said_s}))
        begin_shard(own, already)

    monkeypatch.setattr(Progress, "begin_shard", beside_others)
    write(rewriting(llama), shards, out, shown)
    assert [news.done for news in shown] == sorted(news.done for news in shown)
    assert 3 <= shown[0].done < 24
    assert all(1000 < news.texts_per_s < 2000 and 9000 < news.tokens_per_s < 18000 for news in shown[1:])
    assert 4 <= shown[0].failures["empty"] < 8  # a rank that ended has counted, too
    assert [path.name for path in (out / "progress").iterdir()] == ["other-2-of-00001.json"]
    assert "tokens/s, not fit: " in shown[-1].said()


def test_a_journal_keeps_whole_batches(tmp_path):
    path, batches = (
        tmp_path / "j",
        [[Made(0, "a", "human", "line\nend\r\u2028", None, 3)], [], [Made(1, "b", "x", "", "empty", 0)]],
    )
    journal = Journal(path, {"seed": 0})
    for batch in batches:
        journal.append(batch)
    journal.close()
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n") - 1
        assert num_batches(path, {"seed": 0}) == max(whole, 0)
        journal = Journal(path, {"seed": 0})
        assert journal.batches == batches[: max(whole, 0)]
        journal.append(batches[0])
        journal.close()
        assert num_batches(path, {"seed": 0}) == max(whole, 0) + 1
    assert num_batches(path, {"seed": 1}) == 0
    assert Journal(path, {"seed": 1}).batches == []


@pytest.mark.slow
def test_a_killed_command_goes_on(llama_folder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(6):
        write_tar(shards / f"{number:05d}.tar", [make_sample(12 * number + place) for place in range(12)])
    arguments = ("captions", "rewrite", llama_folder, "--data", f"{shards}/*.tar", "--source", "human", "--batch", "2")
    whole = tmp_path / "whole"
    output = run(*arguments, "--out", whole)
    assert "72 of 72 texts" in output
    assert "72 texts of 72 samples in 6 shards" in output

    out = tmp_path / "out"
    killed = start(*arguments, "--out", out, "--ranks", "2")
    code, _ = signal_when(killed, lambda: len(list(out.glob("texts/0*.parquet"))) >= 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in out.glob("texts/0*.parquet")}
    assert 2 <= len(there) < 6
    stopped = start(*arguments, "--out", out)
    code, output = signal_when(stopped, lambda: len(list(out.glob("texts/0*.parquet"))) > len(there), signal.SIGINT)
    assert (code, output.splitlines()[-1]) == (130, "interrupted")
    run(*arguments, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert files(out) == files(whole)


def test_of_a_subset_its_samples_alone_are_rewritten(llama, shards, tmp_path):
    tars = sorted(map(str, shards.glob("*.tar")))
    cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")))
    list(write_manifest(tars, tmp_path / "all", cache, workers=1))
    kept = [np.array([0, 8], np.uint32), np.array([], np.uint32), np.array([11], np.uint32), np.array([3, 5], np.uint32)]
    write_table(tmp_path / "all", [Path(tar).name for tar in tars], [len(each) for each in kept], kept)
    out = tmp_path / "out"
    data = Data(*open_shards("--data", tars, str(tmp_path / "all"), cache))
    task = rewriting(llama, max_tokens=60)
    assert write_texts(task, data, out, World(0, 1, 0, CPU), lambda news: None).samples == 5
    made = rows(out)
    assert [int(row["key"]) for row in made if row["source"] == "human"] == [0, 8, 24, 28, 30]
    # training looks for a text by its sample's place among all
    config = SourceConfig(
        shards=tars, manifest=str(tmp_path / "all"), sidecars={"r": str(out / "sidecar")}, texts={"human": "r:human"}
    )
    source = Source("own", config, cache)
    texts = {row["key"]: row["text"] for row in made if row["source"] == "human" and row["reason"] is None}
    assert {"000000008", "000000028", "000000030"} & texts.keys()  # whose places among all and among those kept differ
    for shard, count in enumerate(source.manifest.counts):
        for index in range(int(count)):
            ordinal = source.manifest.ordinal(shard, index)
            found = source.reader(shard, ordinal)
            assert source.texts(found, shard, ordinal) == ({"human": texts[found.key]} if found.key in texts else {})


def test_mds_has_the_texts_of_the_tars_that_it_was_made_of(llama, shards, tmp_path):
    cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")))
    list(to_mds(sorted(map(str, shards.glob("*.tar"))), tmp_path / "mds", cache, workers=1))
    data = Data(*open_shards("--data", (f"{tmp_path}/mds/index.json",), None, cache))
    out = tmp_path / "out"
    write_texts(rewriting(llama, max_tokens=24), data, out, World(0, 1, 0, CPU), lambda news: None)
    made = [row for row in rows(out) if row["source"] == "human"]
    assert [row["key"] for row in made] == keys(shards)
    config = SourceConfig(
        shards=[f"{tmp_path}/mds/index.json"], sidecars={"r": str(out / "sidecar")}, texts={"human": "r:human"}
    )
    source = Source("own", config, cache)
    places = [(shard, place) for shard, count in enumerate(source.manifest.counts) for place in range(int(count))]
    read = [source.texts(source.reader(*place), *place).get("human") for place in places]
    assert read == [row["text"] if row["reason"] is None else None for row in made]
    assert any(read)


@pytest.mark.slow
def test_what_a_command_gets_wrong_is_said_in_one_line(llama_folder, shards, tmp_path):
    for arguments, named in (
        (("rewrite", tmp_path / "none"), "is no folder, and models are not fetched by name"),
        (("rewrite", llama_folder, "--source", "me"), "shipped are chatgpt, bard, mscoco, human"),
        (("recaption", llama_folder), "cannot be loaded"),
    ):
        code, output = finish(start("captions", *arguments, "--data", f"{shards}/*.tar", "--out", tmp_path / "out"))
        assert code == 2
        assert named in output
        assert "Traceback" not in output
    code, output = finish(start("captions", "rewrite", llama_folder, "--data", tmp_path / "x.tar", "--out", tmp_path / "out"))
    assert (code, "no shards match" in output) == (2, True)
    assert not (tmp_path / "out").exists()
