"""Numbers with their nouns."""


def number_of(count: int, noun: str, plural: str = "") -> str:
    """`1 shard`, `1,200 shards`; `plural` where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
