"""Labelled pairs made up from a configuration's shapes, cut into chunks as the loader cuts a global batch.

Dimensions: B slots, C channels, H W pixels, T tokens.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from scaleclip.config import RunConfig
from scaleclip.data.loader import Batch
from scaleclip.models.dual_encoder import DualEncoder

_SHORTEST_TEXT = 3


def global_batch(config: RunConfig, model: DualEncoder, step: int) -> Batch:
    """The pairs of optimizer step `step`, the same ones whenever this is asked.

    Among them are two that could not be read and, of larger batches, three of one concept and two of another.
    """
    random = torch.Generator().manual_seed(config.run.seed + step)
    size, pixels = config.train.global_batch, config.model.image.size
    valid_B, ids_B = torch.ones(size, dtype=torch.bool), torch.arange(size)
    valid_B[[size // 3, size - 2]] = size < 8
    ids_B[[0, size // 4, size - 1]] = 0
    ids_B[size // 2] = min(1, size - 1)
    pixels_BCHW = torch.randint(0, 256, (size, 3, pixels, pixels), generator=random).to(torch.uint8)
    batch = Batch(
        pixels_BCHW * valid_B[:, None, None, None],
        tuple(_texts(config, model, random) for _ in config.data.views),
        ids_B * valid_B,
        valid_B,
        torch.randint(0, 2**62, (size,), generator=random),
        keys=tuple(map(str, range(size))), faults=(), counts={}, cache={}, stage_s={}, ready_s=0.0,
    )  # fmt: skip
    if config.model.projector:
        augmented = (torch.randint(0, 256, pixels_BCHW.shape, generator=random).to(torch.uint8) for _ in range(2))
        batch = batch._replace(augmented_BCHW=tuple(augmented))
    if config.model.caption_decoder:
        queries = config.model.caption_decoder.queries
        captions_BS = torch.randint(0, model.text.body.config.vocab_size, (size, queries + 1), generator=random)
        lengths_B = torch.randint(1, queries + 1, (size,), generator=random)
        batch = batch._replace(captions_BS=captions_BS, caption_lengths_B=lengths_B * valid_B)
    if config.data.text_pairs.sources:
        num_texts = 2 + config.data.text_pairs.num_negatives
        pairs_valid_B = torch.ones(size, dtype=torch.bool)
        pairs_valid_B[[size // 2, size - 1]] = size < 8
        texts = tuple(_texts(config, model, random) for _ in range(num_texts))
        batch = batch._replace(pairs_BT=texts, pairs_valid_B=pairs_valid_B)
    return batch


def share_chunks(batch: Batch, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
    """A rank's share of a global batch in chunks; slots past its end are invalid."""
    share = -(-len(batch.valid_B) // world_size)
    return [
        _slots(batch, first, min(first + micro_batch, (rank + 1) * share))
        for first in range(rank * share, (rank + 1) * share, micro_batch)
    ]


def _texts(config: RunConfig, model: DualEncoder, random: torch.Generator) -> Tensor:
    values, size, length = model.text.body.config, config.train.global_batch, config.model.text.context_length
    tokens_BT = torch.randint(0, values.vocab_size, (size, length), generator=random)
    last_B1 = torch.randint(min(_SHORTEST_TEXT, length) - 1, length, (size, 1), generator=random)
    place_T = torch.arange(length)
    if values.eos_token_id is not None:
        tokens_BT = torch.where(place_T == last_B1, values.eos_token_id, tokens_BT)
    return torch.where(place_T > last_B1, values.pad_token_id or 0, tokens_BT)


def _slots(batch: Batch, first: int, last: int) -> Batch:
    """Slots `first` to `last` - 1."""
    size = len(batch.valid_B)
    place_B = torch.arange(first, last)
    # a slot past the end still has a text that a tower can read
    from_B, is_there_B = place_B.clamp(max=size - 1), place_B < size
    cut: Batch = tree_map_only(Tensor, lambda part: part[from_B], batch)
    lengths_B, pairs_valid_B = cut.caption_lengths_B, cut.pairs_valid_B
    return cut._replace(
        pixels_BCHW=cut.pixels_BCHW * is_there_B[:, None, None, None],
        ids_B=cut.ids_B * is_there_B,
        valid_B=cut.valid_B & is_there_B,
        caption_lengths_B=None if lengths_B is None else lengths_B * is_there_B,
        pairs_valid_B=None if pairs_valid_B is None else pairs_valid_B & is_there_B,
        keys=batch.keys[first:last] + ("",) * int((~is_there_B).sum()),
    )
