"""Text against text: how well similarities follow people's (STS), and retrieval of documents by queries.

Shapes: P pairs, Q queries, D documents, E embedding width.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaleclip.data.tables import SUFFIXES, read_table
from scaleclip.errors import ConfigError
from scaleclip.evaluation.encoder import Encoder
from scaleclip.evaluation.fingerprint import digest
from scaleclip.evaluation.intervals import bootstrap_interval
from scaleclip.evaluation.over_ranks import encode_over_ranks
from scaleclip.evaluation.results import Figure

PAIRS_LAYOUT = f"a table ({', '.join(SUFFIXES)}) of text1, text2 and score"
RETRIEVAL_LAYOUT = (
    f"a folder with tables ({', '.join(SUFFIXES)}): queries and documents (or corpus) of id and text, relevances (or "
    f"qrels/test) of query, document and relevance; BEIR's names of columns are taken as well"
)
_BLOCK = 256
_NDCG_AT, _RECALL_AT = 10, 5


class TextPairs:
    """Pairs of texts that people have scored. Raises ConfigError where `path` is no such table, or all scores are the same."""

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        rows = read_table(Path(path))
        try:
            self.firsts, self.seconds = ([row[key] for row in rows] for key in ("text1", "text2"))
            self.score_P = torch.tensor([float(row["score"]) for row in rows], dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{name}: {path} is not {PAIRS_LAYOUT}: {type(error).__name__}: {error}") from None
        for number, row in enumerate(zip(self.firsts, self.seconds, self.score_P.tolist(), strict=True)):
            if not (isinstance(row[0], str) and isinstance(row[1], str) and math.isfinite(row[2])):
                raise ConfigError(f"{name}: {path}, row {number}: {row} is not two texts and a score: mend it or leave it out")
        if len(set(self.score_P.tolist())) < 2:
            raise ConfigError(f"{name}: {path} has no two pairs of different scores, so that nothing correlates")

    def fingerprint(self) -> str:
        """Digest of texts and scores."""
        return digest([self.firsts, self.seconds, self.score_P.tolist()])


class TextRetrieval:
    """Queries, documents and which are relevant. Raises ConfigError where `path` holds none, or names unknown ones."""

    def __init__(self, name: str, path: str) -> None:
        self.name, folder = name, Path(path)
        queries, documents = (_texts(name, _table(name, folder, files)) for files in (("queries",), ("documents", "corpus")))
        found: dict[str, dict[str, float]] = {}
        for row in read_table(_table(name, folder, ("relevances", "qrels/test"))):
            query, document = (str(_cell(name, row, keys)) for keys in (("query", "query-id"), ("document", "corpus-id")))
            for key, known, kind in ((query, queries, "query"), (document, documents, "document")):
                if key not in known:
                    raise ConfigError(f"{name}: {path}: relevances name the {kind} {key!r}, which is not there")
            relevance = float(_cell(name, row, ("relevance", "score")))
            if relevance > 0:
                found.setdefault(query, {})[document] = relevance
        if not found:
            raise ConfigError(f"{name}: {path} has no query with a relevant document")
        place = {key: number for number, key in enumerate(documents)}
        # queries without relevant documents say nothing
        self.queries = [queries[key] for key in found]
        self.documents = list(documents.values())
        self.relevances = [{place[key]: value for key, value in of.items()} for of in found.values()]

    def fingerprint(self) -> str:
        """Digest of texts and relevances."""
        return digest([self.queries, self.documents, self.relevances])


def evaluate_pairs(encoder: Encoder, pairs: TextPairs) -> list[Figure]:
    """Spearman's correlation, -1 to 1, of the cosines of pairs with their scores; it has no interval. Every rank calls."""
    distinct = list(dict.fromkeys([*pairs.firsts, *pairs.seconds]))
    number = {text: place for place, text in enumerate(distinct)}
    text_NE = encoder.texts(distinct)
    first_PE, second_PE = (text_NE[[number[text] for text in texts]] for texts in (pairs.firsts, pairs.seconds))
    # of features that are no numbers nothing follows
    cosine_P = (first_PE * second_PE).sum(dim=1).nan_to_num(0.0)
    return [Figure(pairs.name, "STS Spearman", spearman(cosine_P, pairs.score_P), 0.0)]


def evaluate_text_retrieval(encoder: Encoder, data: TextRetrieval) -> list[Figure]:
    """nDCG@10 with linear gains and recall@5, the share of the relevant documents, means over queries. Every rank calls.

    As trec_eval measures, but that ties count against the query. Chance is that of a random ranking.
    """
    query_QE, document_DE = encoder.texts(data.queries), encoder.texts(data.documents)

    def measure(start: int, stop: int) -> list[tuple[float, float]]:
        similarity = query_QE[start:stop] @ document_DE.T
        return [_measure(row_D, data.relevances[start + place]) for place, row_D in enumerate(similarity)]

    parts = encode_over_ranks(len(data.queries), _BLOCK, measure)
    measured = torch.tensor([each for part in parts for each in part], dtype=torch.float64)
    num_documents = len(data.documents)
    gain = sum(_discount(rank) for rank in range(min(_NDCG_AT, num_documents))) / num_documents
    chances = [gain * sum(of.values()) / _ideal(of) for of in data.relevances]
    figures = []
    for column, (metric, chance) in enumerate(
        (
            (f"text retrieval nDCG@{_NDCG_AT}", sum(chances) / len(chances)),
            (f"text retrieval recall@{_RECALL_AT}", min(1.0, _RECALL_AT / num_documents)),
        )
    ):
        values_Q = measured[:, column]
        low, high = bootstrap_interval(values_Q)
        figures.append(Figure(data.name, metric, float(values_Q.mean()), chance, low=low, high=high))
    return figures


def spearman(x_P: Tensor, y_P: Tensor) -> float:
    """Pearson's correlation of ranks, where equal values share the mean of theirs; 0 where all values of one are equal, and
    nothing follows the other."""
    ranks = torch.stack([_ranks(x_P), _ranks(y_P)])
    return float(torch.corrcoef(ranks)[0, 1].nan_to_num(0.0))


def _ranks(values_P: Tensor) -> Tensor:
    _, place_P, counts = torch.unique(values_P, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2).double()
    return ranks[place_P]


def _measure(similarity_D: Tensor, relevances: Mapping[int, float]) -> tuple[float, float]:
    """nDCG and recall of a query."""
    # of equally similar ones the most relevant comes last
    ordered = sorted(relevances.items(), key=lambda item: (-float(similarity_D[item[0]]), item[1]))
    wanted_R = similarity_D[[document for document, _ in ordered]]
    # not "at least as similar": NaN must find nothing
    others_R = (~(similarity_D < wanted_R[:, None])).sum(dim=1) - (~(wanted_R < wanted_R[:, None])).sum(dim=1)
    rank_R = (others_R + torch.arange(len(ordered))).tolist()
    gain = sum(value * _discount(rank) for rank, (_, value) in zip(rank_R, ordered, strict=True) if rank < _NDCG_AT)
    return gain / _ideal(relevances), sum(rank < _RECALL_AT for rank in rank_R) / len(ordered)


def _discount(rank: int) -> float:
    return 1 / math.log2(rank + 2)


def _ideal(relevances: Mapping[int, float]) -> float:
    best = sorted(relevances.values(), reverse=True)[:_NDCG_AT]
    return sum(value * _discount(rank) for rank, value in enumerate(best))


def _table(name: str, folder: Path, files: Sequence[str]) -> Path:
    for file in files:
        for suffix in SUFFIXES:
            if (path := folder / f"{file}{suffix}").exists():
                return path
    raise ConfigError(f"{name}: {folder} has no table {' or '.join(files)}; it should be {RETRIEVAL_LAYOUT}")


def _texts(name: str, path: Path) -> dict[str, str]:
    """By id; a title goes before its text, as in BEIR."""
    found: dict[str, str] = {}
    for row in read_table(path):
        key = str(_cell(name, row, ("id", "_id")))
        if key in found:
            raise ConfigError(f"{name}: {path} has two rows of id {key!r}: give each its own")
        found[key] = f"{row.get('title') or ''} {_cell(name, row, ('text',))}".strip()
    return found


def _cell(name: str, row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise ConfigError(f"{name}: a row has no {' or '.join(keys)}: {dict(row)}; it should be {RETRIEVAL_LAYOUT}")
