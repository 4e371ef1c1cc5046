"""What tests of evaluations run on ranks of their own (scaleclip.local_ranks)."""

from pathlib import Path

import torch
from torch.nn.functional import normalize

from evaluation_models import tiny_encoder
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.evaluation import retrieval, texts
from scaleclip.evaluation.captioned import CaptionedImages
from scaleclip.evaluation.evaluate import Evaluation
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.splits import open_splits
from scaleclip.evaluation.suite import OpenedSuite, SuiteEvaluation


def measure(folder: Path, captions: str, texts_folder: str, split: str) -> list[Figure]:
    """Figures of captions, of texts and of a split, in blocks so small that ranks get different numbers of them."""
    retrieval._BLOCK, texts._BLOCK = 3, 2
    cache = ShardCache(CacheConfig(folder=str(folder / "cache")))
    captioned, documents = CaptionedImages("captions", captions, "test", cache), texts.TextRetrieval("texts", texts_folder)
    evaluations: list[Evaluation] = [
        SuiteEvaluation("captions", 11, "", str, lambda encoder, _: retrieval_of(encoder, captioned)),
        SuiteEvaluation("texts", 7, "", str, lambda encoder, _: texts.evaluate_text_retrieval(encoder, documents)),
        *open_splits([split], cache),
    ]
    return OpenedSuite(evaluations, [], []).evaluate(tiny_encoder(folder, batch=4), folder / "features")


def retrieval_of(encoder, captioned) -> list[Figure]:
    from scaleclip.evaluation.captioned import evaluate_retrieval

    return evaluate_retrieval(encoder, captioned)


def failing(folder: Path, captions: str) -> str:
    """The error of each rank where one image is broken."""
    cache = ShardCache(CacheConfig(folder=str(folder / "cache")))
    try:
        retrieval_of(tiny_encoder(folder, batch=1), CaptionedImages("captions", captions, "test", cache))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def found_on_ranks(num_queries: int, block: int) -> list[list[bool]]:
    """Which queries found their item at 1, 5 and 10."""
    retrieval._BLOCK = block
    random = torch.Generator().manual_seed(0)
    query, gallery = (normalize(torch.randn(num, 6, generator=random), dim=1) for num in (num_queries, 60))
    found: list[list[bool]] = retrieval.found_at_k(
        query, gallery, torch.arange(num_queries) % 25, torch.arange(60) % 25
    ).tolist()
    return found
