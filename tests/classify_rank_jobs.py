"""What tests of classification run on ranks of their own."""

from pathlib import Path

import torch

from classified import PROMPTS, tiny_encoder
from scaleclip import distributed
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.evaluation import features, logistic
from scaleclip.evaluation.few_shot import evaluate_few_shot
from scaleclip.evaluation.labelled import open_labelled
from scaleclip.evaluation.linear_probe import evaluate_linear_probe
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.zero_shot import evaluate_zero_shot


def classify(config_path: str, train: str, test: str, folder: str) -> tuple[list[Figure], list[torch.Tensor]]:
    """Every figure of classification on digits, and a fit of the probe; a part has 50 images."""
    distributed.init()
    features._PART, logistic.MOST_ITERATIONS = 50, 20
    cache = ShardCache(CacheConfig(folder=f"{folder}/cache"))
    encoder = tiny_encoder(config_path)
    learned, tried = (open_labelled(name, path, cache) for name, path in (("learned", train), ("tried", test)))
    place = Path(folder) / "features"
    figures = [
        *evaluate_zero_shot(encoder, tried, PROMPTS, mean_per_class=True),
        *evaluate_few_shot(encoder, learned, shots=3, queries=4, episodes=40),
        *evaluate_linear_probe(encoder, learned, tried, mean_per_class=True, features=place, kind="embedding"),
    ]
    found = features.encode_features(encoder, learned, "pooled", None)
    rows = logistic.Rows(found, torch.ones(len(found.label_N), dtype=torch.bool))
    return figures, [logistic.fit([rows], 10, strength, torch.device("cpu")).weight_CD for strength in (0.1, 10.0)]


def classify_with_a_broken_image(config_path: str, test: str, folder: str) -> str:
    """The error of every rank where one of them has an image that is none."""
    distributed.init()
    data = open_labelled("tried", test, ShardCache(CacheConfig(folder=f"{folder}/cache")))
    try:
        evaluate_zero_shot(tiny_encoder(config_path), data, PROMPTS, mean_per_class=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"
