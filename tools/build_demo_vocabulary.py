"""Train the demo's byte-pair vocabulary on the captions of its training shards.

    python tools/build_demo_vocabulary.py           writes scaleclip/data/vocabularies/demo_merges.txt
    python tools/build_demo_vocabulary.py --check   compares instead; exits with 1 if the bytes differ

The same shards give the same bytes: ties between equally frequent pairs go to the lower token ids.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import trainers

from scaleclip.data.tokenizer import WORD_END, base_tokens, byte_pair_backend, clean

DATA = Path(__file__).resolve().parents[1] / "scaleclip" / "data"
SHARDS, VOCABULARY = DATA / "demo" / "train", DATA / "vocabularies" / "demo_merges.txt"
# with 512 bytes, a start and an end token: 4,096 tokens
NUM_MERGES = 3582


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    text = "".join(f"{left} {right}\n" for left, right in train(SHARDS))
    if not arguments.check:
        VOCABULARY.write_text(text, encoding="utf-8")
    elif VOCABULARY.read_text(encoding="utf-8") != text:
        print(f"{VOCABULARY} is not what {SHARDS} gives: run this tool without --check", file=sys.stderr)
        return 1
    return 0


def train(shards: Path) -> list[tuple[str, str]]:
    """The `NUM_MERGES` merges of the captions in `shards`."""
    backend = byte_pair_backend([])
    # naming the base tokens here fixes their ids, which decide ties; the trainer would number them in a hash's order
    trainer = trainers.BpeTrainer(
        vocab_size=512 + NUM_MERGES, special_tokens=base_tokens(), end_of_word_suffix=WORD_END, show_progress=False
    )
    backend.train_from_iterator(captions(shards), trainer)
    merges = [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]
    if len(merges) < NUM_MERGES:
        raise ValueError(f"{shards} holds too few captions for {NUM_MERGES} merges: {len(merges)}")
    return merges


def captions(shards: Path) -> Iterator[str]:
    """Every named text of every sample, cleaned."""
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".json"):
                    yield from (clean(text) for text in json.load(file)["captions"].values())


if __name__ == "__main__":
    sys.exit(main())
