"""Captions in other words, by a language model that is shown examples (LaCLIP, arXiv:2305.20088).

A batch holds captions of about one length, as tokens count, of the whole shard; it shares the examples that it is shown, which
are drawn anew for each batch, and so a prefix that is computed once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from scaleclip.captioning import filters
from scaleclip.captioning.examples import NUM_SHOWN, ExampleSource, one_line
from scaleclip.captioning.filters import Limits
from scaleclip.captioning.generation import Sampling
from scaleclip.captioning.job import batch_seed, without_text
from scaleclip.captioning.journal import Made
from scaleclip.captioning.language_model import LanguageModel
from scaleclip.captioning.prompt import LABELS, RewritePrompt
from scaleclip.data.read_ahead import Chunk, Piece
from scaleclip.data.sample import Sample, SampleError
from scaleclip.data.texts import MAX_CHARACTERS, parse_location
from scaleclip.errors import ConfigError

LIMITS = Limits()


class Rewriting:
    """One rewrite of each caption for every source of examples.

    Args:
        model: writes.
        model_name: what the user calls it.
        model_digest: of its folder.
        examples: the sources.
        task: the sentence that asks.
        sampling: of tokens; LaCLIP's are drawn at a temperature of 0.9.
        text: where the caption lies: `txt`, `json:a.b`.
        batch: captions rewritten at once.
        seed: of all that is drawn.
        limits: when a rewrite is not fit for training.

    Raises:
        ConfigError: `text` is malformed, or examples, caption and rewrite do not fit into the model's context.
    """

    def __init__(
        self,
        model: LanguageModel,
        model_name: str,
        model_digest: str,
        examples: Sequence[ExampleSource],
        task: str,
        sampling: Sampling,
        *,
        text: str = "txt",
        batch: int = 32,
        seed: int = 0,
        limits: Limits = LIMITS,
    ) -> None:
        self.model_name, self.batch, self.seed = model_name, batch, seed
        self.sources: Sequence[str] = [source.name for source in examples]
        self._model, self._digest, self._sampling, self._limits = model, model_digest, sampling, limits
        self._examples = {source.name: source for source in examples}
        self._text, self._find_text = text, parse_location("--text", text, {})
        self._prompt = RewritePrompt(task, model)
        self.prompt_name = self._prompt.name
        self._has_example = {source.name: filters.example_finder(source.pairs, limits) for source in examples}
        room = model.max_positions
        for source in examples:
            needed = self._prompt.longest(source.pairs, NUM_SHOWN) + sampling.max_tokens
            if room is not None and needed > room:
                raise ConfigError(
                    f"--source={source.name}: a prompt with its longest examples and a rewrite take up to {needed} tokens, the "
                    f"model has {room} positions: shorten the examples, or lower --max-tokens={sampling.max_tokens}"
                )

    @property
    def identity(self) -> Mapping[str, Any]:
        """What all rewrites in a folder share."""
        sources = {each.name: {"examples": len(each.pairs), "digest": each.digest} for each in self._examples.values()}
        return {
            "task": "rewrite", "model_digest": self._digest, "dtype": self._model.dtype, "chat": self._model.chat,
            "prompts": {self.prompt_name: self._prompt.text}, "sources": sources, "text": self._text,
            "sampling": {**self._sampling.as_json(), "seed": self.seed}, "limits": asdict(self._limits),
        }  # fmt: skip

    def pieces(self, shard: int, num_samples: int, done: int) -> list[Piece]:
        """A shard whole: its captions are sorted."""
        return [Piece(shard, 0, num_samples)]

    def prepare(self, sample: Sample, shard: int, ordinal: int) -> str:
        """The caption in one line. Raises SampleError without one."""
        text = self._find_text(sample, shard, ordinal)
        caption = one_line((text or "")[:MAX_CHARACTERS])
        if not caption:
            raise SampleError("empty_caption", f"{sample.key} has no text at {self._text}")
        return caption

    def collate(self, items: Sequence[str]) -> list[str]:
        """As they are."""
        return list(items)

    def make(self, shard: str, chunk: Chunk[list[str]], done: int) -> Iterator[list[Made]]:
        """Samples without a caption first, then batch after batch, source after source."""
        for number, batch in enumerate(self._batches(shard, chunk)):
            if number >= done:
                yield batch()

    def _batches(self, shard: str, chunk: Chunk[list[str]]) -> Iterator[Callable[[], list[Made]]]:
        yield partial(without_text, chunk.bad, self.sources)
        captions = chunk.content or []
        endings = [self._prompt.ending(caption) for caption in captions]
        # the longest first: where memory is short, it shows at once
        order = sorted(range(len(endings)), key=lambda place: -len(endings[place]))
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        for source in self.sources:
            for number, places in enumerate(batches):
                rows = [(chunk.ordinals[place], chunk.keys[place], captions[place], endings[place]) for place in places]
                yield partial(self._rewrite, source, rows, batch_seed(self.seed, shard, source, number))

    def _rewrite(self, source: str, rows: Sequence[tuple[int, str, str, list[int]]], seed: int) -> list[Made]:
        prefix = self._prompt.prefix(self._examples[source].draw(seed))
        written = self._model.write_lines(prefix, [ending for *_, ending in rows], self._sampling, seed)
        made = []
        for (ordinal, key, caption, _), new in zip(rows, written, strict=True):
            reason = filters.fault(
                new.text, caption, task=self._prompt.task, labels=LABELS, examples=self._has_example[source], ended=new.ended,
                limits=self._limits,
            )  # fmt: skip
            made.append(Made(ordinal, key, source, new.text, reason, new.tokens))
        return made
