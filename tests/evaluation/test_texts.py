"""Text against text: correlations, retrieval, their tables, and mteb's protocol."""

import json
import math
import sys
import types
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from evaluation_models import tiny_encoder
from scaleclip.errors import ConfigError
from scaleclip.evaluation import texts
from scaleclip.evaluation.mteb_adapter import MtebEncoder
from scaleclip.evaluation.texts import TextPairs, TextRetrieval, evaluate_pairs, evaluate_text_retrieval, spearman


class Known:
    """Texts with known vectors."""

    def __init__(self, vectors):
        self.vectors = vectors

    def texts(self, wanted):
        return torch.tensor([self.vectors[text] for text in wanted], dtype=torch.float32)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        sign = "," if path.suffix == ".csv" else "\t"
        path.write_text(
            "".join(sign.join(map(str, cells)) + "\n" for cells in [list(rows[0]), *(row.values() for row in rows)])
        )
    return path


PAIRS = [
    {"text1": "one", "text2": "two", "score": 2.5},
    {"text1": "one", "text2": "three", "score": 0.0},
    {"text1": "two", "text2": "three", "score": 2.5},
]
VECTORS = {"one": [1.0, 0.0], "two": [0.6, 0.8], "three": [0.0, 1.0]}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_pairs_are_read_from_every_table(suffix, tmp_path):
    pairs = TextPairs("sts", str(write(tmp_path / f"pairs{suffix}", PAIRS)))
    [figure] = evaluate_pairs(Known(VECTORS), pairs)
    # cosines 0.6, 0, 0.8 against 2.5, 0, 2.5: ranks 2, 1, 3 and 2.5, 1, 2.5
    assert (figure.split, figure.metric, figure.chance) == ("sts", "STS Spearman", 0.0)
    assert figure.value == pytest.approx(math.sqrt(3) / 2)
    assert figure.low is None


def test_spearman_is_scipys():
    scipy_stats = pytest.importorskip("scipy.stats")
    random = torch.Generator().manual_seed(0)
    x, y = torch.rand(200, generator=random), torch.randint(0, 6, (200,), generator=random)
    assert spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-12)
    assert spearman(x, 3 * x) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text1": "a", "text2": "b"}\n', "is not a table .* of text1, text2 and score: KeyError: 'score'"),
        ("a.csv", "text1,text2,score\na,b,high\n", "could not convert string to float"),
        ("a.csv", "text1,text2,score\na,b,1\nb,c,1\n", "no two pairs of different scores"),
        ("a.jsonl", "{", "cannot be read: JSONDecodeError"),
        ("a.txt", "", r"tables are \.csv"),
        ("a.parquet", "x", "cannot be read: ArrowInvalid"),
    ],
)
def test_faults_of_pairs_are_errors(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        TextPairs("sts", str(tmp_path / name))


def retrieval_tables(folder, relevances, documents=6):
    write(folder / "queries.jsonl", [{"id": f"q{n}", "text": f"q{n}"} for n in range(3)])
    write(folder / "documents.jsonl", [{"id": f"d{n}", "text": f"d{n}"} for n in range(documents)])
    write(folder / "relevances.jsonl", [{"query": q, "document": d, "relevance": r} for q, d, r in relevances])
    return TextRetrieval("docs", str(folder))


def unit(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def values(data, vectors):
    return {figure.metric: figure for figure in evaluate_text_retrieval(Known(vectors), data)}


def test_retrieval_by_hand(tmp_path):
    # q1 has no relevant document and says nothing
    data = retrieval_tables(tmp_path, [("q0", "d2", 1), ("q0", "d0", 2), ("q2", "d5", 1), ("q1", "d1", 0)])
    vectors = {f"d{n}": unit(10 * n) for n in range(6)} | {"q0": unit(0), "q2": unit(0)}
    figures = values(data, vectors)
    first = (2 + 1 / math.log2(4)) / (2 + 1 / math.log2(3))
    second = 1 / math.log2(7)
    assert figures["text retrieval nDCG@10"].value == pytest.approx((first + second) / 2)
    assert figures["text retrieval recall@5"].value == 0.5
    assert figures["text retrieval recall@5"].chance == pytest.approx(5 / 6)
    assert figures["text retrieval nDCG@10"].low < figures["text retrieval nDCG@10"].value


def test_retrieval_is_trec_evals(tmp_path):
    """pytrec_eval's formula written out: sort, cut, linear gains."""
    random = torch.Generator().manual_seed(0)
    relevances = [("q0", f"d{n}", 1 + n % 3) for n in range(0, 40, 4)] + [("q1", "d7", 1), ("q2", "d1", 2), ("q2", "d2", 1)]
    data = retrieval_tables(tmp_path, relevances, documents=40)
    names = [f"q{n}" for n in range(3)] + [f"d{n}" for n in range(40)]
    vectors = dict(zip(names, torch.nn.functional.normalize(torch.randn(43, 5, generator=random), dim=1).tolist(), strict=True))
    expected = {"nDCG@10": [], "recall@5": []}
    for query in ("q0", "q1", "q2"):
        wanted = {document: relevance for q, document, relevance in relevances if q == query}
        order = sorted(names[3:], key=lambda d: -float(torch.tensor(vectors[query]) @ torch.tensor(vectors[d])))
        gains = [wanted.get(document, 0) / math.log2(rank + 2) for rank, document in enumerate(order[:10])]
        best = [gain / math.log2(rank + 2) for rank, gain in enumerate(sorted(wanted.values(), reverse=True)[:10])]
        expected["nDCG@10"].append(sum(gains) / sum(best))
        expected["recall@5"].append(sum(document in wanted for document in order[:5]) / len(wanted))
    found = values(data, vectors)
    for metric, each in expected.items():
        assert found[f"text retrieval {metric}"].value == pytest.approx(sum(each) / 3, abs=1e-6)
    assert 0 < found["text retrieval nDCG@10"].value < 1


def test_ties_count_against_the_query(tmp_path):
    data = retrieval_tables(tmp_path, [("q0", "d0", 1)])
    same = {name: [1.0, 0.0] for name in ("q0", *(f"d{n}" for n in range(6)))}
    assert values(data, same)["text retrieval nDCG@10"].value == pytest.approx(1 / math.log2(7))
    nothing = {name: [math.nan, math.nan] for name in same}
    assert values(data, nothing)["text retrieval recall@5"].value == 0


def test_blocks_do_not_matter(tmp_path, monkeypatch):
    data = retrieval_tables(tmp_path, [("q0", "d2", 1), ("q1", "d0", 2), ("q2", "d5", 1)])
    vectors = {f"d{n}": unit(37 * n) for n in range(6)} | {f"q{n}": unit(91 * n) for n in range(3)}
    whole = values(data, vectors)
    monkeypatch.setattr(texts, "_BLOCK", 2)
    assert values(data, vectors) == whole


def test_beirs_layout_is_taken(tmp_path):
    write(tmp_path / "queries.jsonl", [{"_id": "1", "text": "what"}])
    write(tmp_path / "corpus.jsonl", [{"_id": "1", "title": "A", "text": "b"}, {"_id": "2", "title": "", "text": "c"}])
    write(tmp_path / "qrels" / "test.tsv", [{"query-id": "1", "corpus-id": "2", "score": 1}])
    data = TextRetrieval("beir", str(tmp_path))
    assert (data.queries, data.documents, data.relevances) == (["what"], ["A b", "c"], [{1: 1.0}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "documents.jsonl").unlink(), "has no table documents or corpus; it should be a folder"),
        (
            lambda folder: write(folder / "queries.jsonl", [{"id": "q9", "text": "x"}]),
            "name the query 'q0', which is not there",
        ),
        (lambda folder: write(folder / "documents.jsonl", [{"id": "d9", "text": "x"}]), "name the document 'd1'"),
        (lambda folder: write(folder / "queries.jsonl", [{"text": "x"}]), "a row has no id or _id"),
        (
            lambda folder: write(folder / "relevances.jsonl", [{"query": "q0", "document": "d1", "relevance": 0}]),
            "no query with",
        ),
    ],
)
def test_faults_of_retrieval_are_errors(change, message, tmp_path):
    retrieval_tables(tmp_path, [("q0", "d1", 1)])
    change(tmp_path)
    with pytest.raises(ConfigError, match=message):
        TextRetrieval("docs", str(tmp_path))


def test_the_adapter_has_the_shape_of_mtebs_encoders(tmp_path, monkeypatch):
    """Without mteb: the members that its EncoderProtocol of version 2 asks for, called as it calls them."""
    encoder = tiny_encoder(tmp_path)
    model = MtebEncoder(encoder, "me/tiny", "step_1")
    batches = [{"text": ["a cat", "a dog"]}, {"text": ["a bird"]}]
    encoder.model.train()
    vectors = model.encode(batches, task_metadata=None, hf_split="test", hf_subset="default", prompt_type=None, batch_size=7)
    assert encoder.model.training
    assert (vectors.shape, vectors.requires_grad) == ((3, 32), False)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.similarity(vectors[:2].numpy(), vectors.numpy()), vectors[:2] @ vectors.T)
    torch.testing.assert_close(model.similarity_pairwise(vectors, vectors.flip(0)), (vectors * vectors.flip(0)).sum(1))
    meta = types.SimpleNamespace(create_empty=lambda values: values)
    for name in ("mteb", "mteb.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", types.SimpleNamespace(ModelMeta=meta))
    about = model.mteb_model_meta
    assert (about["name"], about["revision"], about["embed_dim"]) == ("me/tiny", "step_1", 32)


def test_mteb_takes_the_adapter(tmp_path):
    """With mteb, which no extra brings."""
    protocols = pytest.importorskip("mteb.models.models_protocols")
    model = MtebEncoder(tiny_encoder(tmp_path), "me/tiny", "step_1")
    assert isinstance(model, protocols.EncoderProtocol)
    assert model.mteb_model_meta.name == "me/tiny"


@pytest.mark.parametrize(
    "row",
    [
        {"text1": None, "text2": "b", "score": 1},
        {"text1": "a", "text2": 3, "score": 1},
        {"text1": "a", "text2": "b", "score": "nan"},
    ],
)
def test_a_pair_that_is_none_is_named(row, tmp_path):
    with pytest.raises(ConfigError, match=r"pairs\.jsonl, row 3: .* is not two texts and a score"):
        TextPairs("sts", str(write(tmp_path / "pairs.jsonl", [*PAIRS, row])))


def test_two_documents_of_one_id_are_refused(tmp_path):
    write(tmp_path / "queries.jsonl", [{"id": "q", "text": "a"}])
    write(tmp_path / "documents.jsonl", [{"id": "d", "text": "a"}, {"id": "d", "text": "b"}])
    write(tmp_path / "relevances.jsonl", [{"query": "q", "document": "d", "relevance": 1}])
    with pytest.raises(ConfigError, match="two rows of id 'd'"):
        TextRetrieval("texts", str(tmp_path))


def test_nothing_follows_where_all_is_the_same_or_no_number():
    ones, scores = torch.ones(5), torch.arange(5.0)
    assert spearman(ones, scores) == 0.0
    pairs = SimpleNamespace(name="sts", firsts=["a", "b", "c"], seconds=["b", "c", "a"], score_P=torch.arange(3.0))
    [figure] = evaluate_pairs(Known({key: [math.nan, 0.0] for key in "abc"}), pairs)
    assert figure.value == 0.0
