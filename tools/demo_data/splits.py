"""Which pictures are trained on and which are held out."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import NamedTuple

from demo_data.pictures import Picture, near_duplicates, slug

SEED = 0
NUM_UNSEEN_CONCEPTS = 200
NUM_UNSEEN_FAMILIES = 100
MIN_VENDORS_OF_UNSEEN = 3
NUM_UNSEEN_CLIPART = 500
UNSEEN_VENDOR = "fluent-emoji-flat"
EMOJI_TEMPLATES = ["an emoji of {}", "a drawing of {}", "an icon of {}", "{}"]
CLIPART_TEMPLATES = ["clip art of {}", "a drawing of {}", "an icon of {}", "{}"]
# Words that tell the members of a family of emoji apart (man / woman singer, red / blue heart, left / right arrow).
FAMILY_WORD = re.compile(
    r"man|men|woman|women|maid|person|people|boy|girl|baby|child|adult|face|button|facing|with|of|and|the|a|in|"
    r"on|left|right|up|down|leftward|rightward|upward|downward|showing|asia|australia|america|europe|africa|red|"
    r"orange|yellow|green|blue|purple|brown|black|white|pink|grey|light|dark|large|small|medium|big|heavy|"
    r"double|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirty|oclock|open|closed|old|older|"
    r"front"
)


class Split(NamedTuple):
    """A held-out set of pictures and how its zero-shot classes are read off a picture."""

    name: str
    about: str
    pictures: list[Picture]
    class_of: Mapping[str, Callable[[Picture], str]]
    templates: list[str]


def drop_doubles(pictures: list[Picture]) -> list[Picture]:
    """Keep one text a picture of a vendor, the shortest name: `flag: Norway` and not `flag: Svalbard & Jan Mayen`."""
    best: dict[tuple[str, bytes], Picture] = {}
    for picture in pictures:
        key = (picture.source, picture.webp)
        if key not in best or (len(picture.name), picture.name) < (len(best[key].name), best[key].name):
            best[key] = picture
    return [picture for picture in pictures if best[picture.source, picture.webp] is picture]


def family_stem(label: str) -> str:
    """What is left of a label without the words that tell the members of a family apart."""
    words = (word.removesuffix("s").removeprefix("mer") for word in slug(label.split(":")[0]).split("-"))
    return " ".join(sorted({word for word in words if not FAMILY_WORD.fullmatch(word)}))


def concepts_without_family(emoji: list[Picture]) -> set[str]:
    """Concepts whose label stem no other concept has and whose drawings are no near-duplicate of another concept's."""
    concepts_of_stem: dict[str, set[str]] = defaultdict(set)
    for picture in emoji:
        concepts_of_stem[family_stem(picture.name)].add(picture.concept)
    alone = {concept for concepts in concepts_of_stem.values() if len(concepts) == 1 for concept in concepts}
    for picture, near in zip(emoji, near_duplicates(emoji, emoji, "compare emoji"), strict=True):
        if any(emoji[index].concept != picture.concept for index in near):
            alone.discard(picture.concept)
    return alone


def draw_concepts(emoji: list[Picture], allowed: set[str], number: int) -> set[str]:
    """`number` of the allowed concepts that enough vendors draw, each group's share as among those."""
    vendors: dict[str, set[str]] = defaultdict(set)
    group_of: dict[str, str] = {}
    for picture in emoji:
        vendors[picture.concept].add(picture.source)
        group_of[picture.concept] = picture.group
    candidates = sorted(concept for concept in allowed if len(vendors[concept]) >= MIN_VENDORS_OF_UNSEEN)
    random.Random(SEED).shuffle(candidates)
    # Sorted by group (the sort is stable) and taken at equal steps: every group gives its share.
    by_group = sorted(candidates, key=group_of.__getitem__)
    return {by_group[index * len(by_group) // number] for index in range(number)}


def without_unseen(clipart: list[Picture], unseen: list[Picture]) -> list[Picture]:
    """The clip arts that neither have a held-out emoji's name, in singular or plural, nor look like one."""
    names = {picture.concept.removesuffix("s") for picture in unseen}
    near = near_duplicates(clipart, unseen, "compare clip art with unseen emoji")
    return [
        picture
        for picture, found in zip(clipart, near, strict=True)
        if not len(found) and picture.concept.removesuffix("s") not in names
    ]


def draw_unseen_clipart(clipart: list[Picture], train: list[Picture]) -> list[Picture]:
    """NUM_UNSEEN_CLIPART clip arts of unique title and caption without near-duplicate among all training pictures."""
    captions = Counter(picture.caption.lower() for picture in train)
    concepts = Counter(picture.concept for picture in train)
    unique = [p for p in clipart if captions[p.caption.lower()] == 1 and concepts[p.concept] == 1]
    near = near_duplicates(unique, train, "compare clip art")
    candidates = [picture for picture, found in zip(unique, near, strict=True) if len(found) == 1]
    return random.Random(SEED).sample(candidates, NUM_UNSEEN_CLIPART)


def split_pictures(emoji: list[Picture], clipart: list[Picture]) -> tuple[list[Picture], list[Split]]:
    """(training pictures, held-out splits)."""
    families = draw_concepts(emoji, concepts_without_family(emoji), NUM_UNSEEN_FAMILIES)
    concepts = draw_concepts(emoji, {picture.concept for picture in emoji} - families, NUM_UNSEEN_CONCEPTS)
    emoji_classes = {"subgroup": attrgetter("subgroup"), "group": attrgetter("group")}
    unseen_concept = Split(
        "unseen_concept",
        f"{NUM_UNSEEN_CONCEPTS} emoji that no training shard shows, as drawn by every vendor; kin of theirs may be there",
        [picture for picture in emoji if picture.concept in concepts],
        emoji_classes,
        EMOJI_TEMPLATES,
    )
    unseen_family = Split(
        "unseen_family",
        f"{NUM_UNSEEN_FAMILIES} emoji of which no training shard shows even kin, by name or looks, as drawn by every vendor",
        [picture for picture in emoji if picture.concept in families],
        emoji_classes,
        EMOJI_TEMPLATES,
    )
    seen = [picture for picture in emoji if picture.concept not in concepts | families]
    unseen_vendor = Split(
        "unseen_vendor",
        f"the emoji of {UNSEEN_VENDOR}, a drawing style that no training shard shows",
        [picture for picture in seen if picture.source == UNSEEN_VENDOR],
        emoji_classes,
        EMOJI_TEMPLATES,
    )
    seen_clipart = without_unseen(clipart, unseen_concept.pictures + unseen_family.pictures)
    pool = [picture for picture in seen if picture.source != UNSEEN_VENDOR] + seen_clipart
    held_out = draw_unseen_clipart(seen_clipart, pool)
    unseen_clipart = Split(
        "unseen_clipart",
        f"{NUM_UNSEEN_CLIPART} clip arts without near-duplicate or equal text in the training shards",
        held_out,
        {"category": attrgetter("group")},
        CLIPART_TEMPLATES,
    )
    held_out_paths = {picture.path for picture in held_out}
    train = [picture for picture in pool if not picture.path or picture.path not in held_out_paths]
    return train, [unseen_vendor, unseen_concept, unseen_family, unseen_clipart]
