"""Build the image-text pairs that scaleclip carries, as webdataset shards: emoji of five vendors and clip art.

The sources are packages; fetch them by name into one folder, at the versions that
demo_data/packages.py lists:

    npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat @iconify-json/emojione \\
        @iconify-json/fxemoji emojibase-data
    apt-get download openclipart-png openclipart-svg

Needs `pip install resvg-py` (renders SVG) and `dpkg-deb` beside the dependencies of scaleclip. The same sources give
the same bytes on each run with the same Pillow and resvg-py (the committed shards: pillow 13.0.0, resvg-py 0.5.0);
`--check` compares a fresh build with what lies in the repository.

Steps: read and render the pictures; drop doubles; draw the held-out splits; write train and evaluation shards.
"""

import argparse
import filecmp
import io
import json
import random
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from demo_data.clipart import CLIPART, read_clipart
from demo_data.emoji import EMOJI_LICENSES, read_emoji
from demo_data.packages import verify_sources
from demo_data.pictures import SIZE, Picture, is_blank
from demo_data.splits import SEED, Split, drop_doubles, split_pictures
from demo_data.triplets import text_triplets

SAMPLES_PER_SHARD = 500
PARTS = ("train", "eval")


def to_json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent) + "\n").encode()


def sample_files(key: str, picture: Picture) -> Iterator[tuple[str, bytes]]:
    texts = {"name": picture.name, "keywords": picture.keywords, "description": picture.description}
    fields = {
        "key": key,
        "caption": picture.caption,
        "captions": {name: text for name, text in texts.items() if text},
        "source": picture.source,
        "license": picture.license,
        "concept": picture.concept,
        "group": picture.group,
        "subgroup": picture.subgroup,
        "path": picture.path,
        "width": SIZE,
        "height": SIZE,
    }
    yield f"{key}.json", to_json({name: value for name, value in fields.items() if value})
    yield f"{key}.txt", picture.caption.encode()
    yield f"{key}.webp", picture.webp


def write_shards(pictures: list[Picture], prefix: Path, samples_per_shard: int) -> list[str]:
    """Write `<prefix>-00000.tar`, ... with img2dataset's keys and statistics; returns the keys."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    keys = []
    for shard, start in enumerate(range(0, len(pictures), samples_per_shard)):
        members = pictures[start : start + samples_per_shard]
        with tarfile.open(f"{prefix}-{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, picture in enumerate(members):
                keys.append(f"{shard:05d}{place:04d}")
                for name, data in sample_files(keys[-1], picture):
                    # A fresh TarInfo has mtime, uid and gid 0, hence the same bytes on each run.
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        count = len(members)
        stats = {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0}
        Path(f"{prefix}-{shard:05d}_stats.json").write_bytes(to_json(stats, indent=4))
    return keys


def write_split(split: Split, folder: Path) -> None:
    """Write one shard and `<name>.json` with all that an evaluation needs beside the images."""
    pictures = random.Random(SEED).sample(split.pictures, len(split.pictures))
    keys = write_shards(pictures, folder / split.name, len(pictures))
    texts = {picture.concept: picture.caption for picture in pictures}
    zero_shot = []
    for name, class_of in split.class_of.items():
        classes = sorted({class_of(picture) for picture in pictures})
        labels = {key: classes.index(class_of(picture)) for key, picture in zip(keys, pictures, strict=True)}
        zero_shot.append({"name": name, "classes": classes, "templates": split.templates, "labels": labels})
    description = {
        "name": split.name,
        "about": split.about,
        "gallery": [{"concept": concept, "text": texts[concept]} for concept in sorted(texts)],
        "concepts": {key: picture.concept for key, picture in zip(keys, pictures, strict=True)},
        "zero_shot": zero_shot,
    }
    (folder / f"{split.name}.json").write_bytes(to_json(description))


def build(sources: Path, out: Path) -> None:
    # One clip art has 231 million pixels; the checksums vouch for the sources.
    Image.MAX_IMAGE_PIXELS = None
    verify_sources(sources)
    emoji, clipart = (
        [picture for picture in drop_doubles(pictures) if not is_blank(picture)]
        for pictures in (read_emoji(sources), read_clipart(sources))
    )
    train, splits = split_pictures(emoji, clipart)
    for part in PARTS:
        shutil.rmtree(out / part, ignore_errors=True)
    for vendor in [*EMOJI_LICENSES, CLIPART]:
        pictures = [picture for picture in train if picture.source == vendor]
        shuffled = random.Random(SEED).sample(pictures, len(pictures))
        write_shards(shuffled, out / "train" / vendor, SAMPLES_PER_SHARD)
    (out / "train" / "text_triplets.jsonl").write_bytes(b"".join(map(to_json, text_triplets(train))))
    for split in splits:
        write_split(split, out / "eval")


def differences(expected: Path, actual: Path) -> Iterator[str]:
    """Files below train/ and eval/ that are not byte for byte the same in both folders."""
    for part in PARTS:
        for name in sorted({path.name for root in (expected, actual) for path in (root / part).glob("*")}):
            one, other = expected / part / name, actual / part / name
            if not (one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)):
                yield f"{part}/{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder of the fetched packages")
    parser.add_argument("--out", type=Path, default=Path("scaleclip/data/demo"), help="where train/ and eval/ go")
    parser.add_argument("--check", action="store_true", help="write nothing; fail unless a fresh build equals --out")
    arguments = parser.parse_args()
    if not arguments.check:
        build(arguments.sources, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.sources, Path(folder))
        changed = list(differences(arguments.out, Path(folder)))
    Console().print(f"differ: {', '.join(changed)}" if changed else "every shard is as a fresh build gives it")
    raise SystemExit(bool(changed))


if __name__ == "__main__":
    main()
