"""A run's page: what it shows is what lies in the folder, and whatever is missing is said."""

import html
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import runs
from report_runs import NUM_CONCEPTS, NUM_IMAGES, make_row, make_run, write_evaluations
from scaleclip.config import CacheConfig
from scaleclip.data.cache import ShardCache
from scaleclip.errors import ConfigError
from scaleclip.evaluation.results import Figure
from scaleclip.evaluation.saved import SavedFigures
from scaleclip.evaluation.splits import open_splits
from scaleclip.evaluation.targets import Target
from scaleclip.report import page, sheets
from scaleclip.report.curves import Measured, _evaluation_panels
from scaleclip.report.page import write_report
from scaleclip.report.tables import evaluation_history, history_table


def text_of(path: Path) -> str:
    """A page's words."""
    body = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def test_the_page_shows_what_lies_in_the_folder(run):
    reported = [("held", "image -> text R@1", 20), ("coco", "text -> image R@5", 71)]
    figures = [
        {"dataset": name, "metric": metric, "percent": percent, "where": "table 3"} for name, metric, percent in reported
    ]
    target = Target.model_validate({"system": "Other", "source": "a paper", "figures": figures})
    written = write_report(run, target=target)
    assert written == run / "report.html"
    text = text_of(written)
    for said in (
        "12.3%", "10.0% - 15.0%", "6.2%", "20.0%", "-7.7", "table 3", "25.0%",  # results
        "the figures of Other, a paper", "Not measured here: text -> image R@5 of coco (71.0 %).",
        "laion/400m no_image 3", "cc empty_caption 12", "worst.tar (3), other.tar (1)", "key-of-a-bad-step",  # faults
        "node-7", "abc1234", "torch 2",  # provenance
        "global_batch: ", "nothing & all", "with seed 0", "step 20",
    ):  # fmt: skip
        assert said in text, said
    pictures = {path.name for path in (run / "report").iterdir()}
    names = ("curves", "loss", "learning_rate", "logit_scale", "gradient_norm", "throughput", "data_wait", "loader")
    assert {f"{name}.png" for name in (*names, "map_held", "text_to_image_held", "image_to_text_held")} <= pictures
    content = written.read_text()
    assert len(content) < 1.5e6
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", content), "the page needs nothing else"
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]+>", content))


def test_texts_of_samples_are_escaped(run, monkeypatch):
    monkeypatch.setattr(sheets, "NUM_QUERIES", NUM_CONCEPTS + 1)
    content = write_report(run).read_text()
    assert "<script" not in content
    assert "&lt;script&gt;" in content


def test_curves_are_marked_where_stages_and_starts_begin(run, monkeypatch):
    seen = []

    def look(title, rows, marks, evaluations):
        seen.append((marks, evaluations))
        return []

    monkeypatch.setattr(page, "draw_curves", look)
    write_report(run, with_sheets=False)
    [(marks, evaluations)] = seen
    assert marks == ([(12 * 8, "stage 1")], [4 * 8, 16 * 8], [7 * 8])
    assert evaluations[0] == (80, {("held", "image -> text R@1"): 0.125})
    assert [each.samples for each in evaluations] == [80, 160]


@pytest.mark.parametrize(
    "rows",
    [[], [make_row(1)], [make_row(step, loss=None, grad_norm=None, terms={"a": None, "b": None}) for step in (1, 2, 3)]],
    ids=["no row", "one row", "nothing finite"],
)
def test_what_is_missing_is_said(tmp_path, rows):
    run = make_run(tmp_path / "run", rows)
    text = text_of(write_report(run))
    assert "the run has no eval.splits" in text
    assert "No checkpoint was measured yet" in text
    assert ("no row of metrics yet" in text) == (not rows)
    assert ("loss not finite" in text) == (len(rows) == 3)


def test_a_run_without_a_checkpoint_has_a_page(tmp_path, split):
    run = make_run(tmp_path / "run", [make_row(1)], (str(split),))
    assert "has no checkpoint" in text_of(write_report(run))
    (split.parent / "held-00000.tar").unlink()
    assert "left out" in text_of(write_report(run))


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="is no run folder"):
        write_report(tmp_path)


def test_old_pictures_go(run):
    (run / "report").mkdir()
    (run / "report" / "map_of_another_split.png").touch()
    write_report(run, with_sheets=False)
    assert "map_of_another_split.png" not in {path.name for path in (run / "report").iterdir()}


def test_a_sheet_is_what_a_full_sort_finds(split, encoder, tmp_path):
    [data] = open_splits([str(split)], ShardCache(CacheConfig(folder=str(tmp_path / "cache"))))
    advanced = []
    sheet = sheets.make_sheet(encoder, data, 0, advanced.append)
    assert sum(advanced) == NUM_IMAGES + NUM_CONCEPTS + 1
    keys, pixels = data.images(0, NUM_IMAGES, encoder.size)
    with torch.no_grad():
        image_NE, text_GE = encoder.images(pixels), encoder.texts(sheet.texts)
    torch.testing.assert_close(normalize(image_NE, dim=1), image_NE)
    similarity = (image_NE @ text_GE.T).numpy()
    right = np.array([[data.split.concepts[key] == entry.concept for entry in data.split.gallery] for key in keys])
    for queries, cosines, matches in ((sheet.of_texts, similarity.T, right.T), (sheet.of_images, similarity, right)):
        assert len({query.number for query in queries}) == len(queries) == sheets.NUM_QUERIES
        for query in queries:
            order = np.argsort(-cosines[query.number])
            assert list(query.best) == list(order[: sheets.NUM_BEST])
            np.testing.assert_allclose(query.similarity, cosines[query.number][order[: sheets.NUM_BEST]], atol=1e-6)
            assert list(query.is_right) == list(matches[query.number][order[: sheets.NUM_BEST]])
            assert query.rank == 1 + np.flatnonzero(matches[query.number][order])[0]
    images, texts = list(sheet.map.images), list(sheet.map.texts)
    np.testing.assert_allclose(sheet.map.cosine, similarity[np.ix_(images, texts)], atol=1e-6)
    np.testing.assert_array_equal(sheet.map.is_right, np.eye(sheets.NUM_IN_MAP, dtype=bool))
    shown = {*images, *(query.number for query in sheet.of_images), *(i for query in sheet.of_texts for i in query.best)}
    assert set(sheet.thumbnails) == shown
    assert {Image.open(io.BytesIO(content)).size for content in sheet.thumbnails.values()} == {(112, 112)}


def test_queries_are_drawn_by_the_seed_and_not_by_the_model(split, encoder, tmp_path):
    [data] = open_splits([str(split)], ShardCache(CacheConfig(folder=str(tmp_path / "cache"))))

    def drawn(seed):
        sheet = sheets.make_sheet(encoder, data, seed, lambda done: None)
        return [query.number for query in (*sheet.of_texts, *sheet.of_images)], sheet.map.images

    before = drawn(0)
    torch.nn.init.normal_(encoder.model.image_projection.weight)
    assert drawn(0) == before
    assert drawn(1) != before


def test_steps_that_were_evaluated_stand_beside_each_other(tmp_path):
    run = make_run(tmp_path / "run", [])
    assert history_table(evaluation_history(run)) is None
    held = Figure("held 2", "R@1", 0.1, 0)
    write_evaluations(run, {10: [held]})
    for step, name, weights, value in ((5, "held 2", "a", 0.05), (20, "food", "a", 0.2), (20, "food", "b", 0.3)):
        kept = SavedFigures(run / "evaluations" / f"step_{step:08d}", weights, step)
        kept.save(f"{name} {weights}", "", [Figure(name, "R@1", value, 0)])
    table = history_table(evaluation_history(run))
    assert table == ((5, 10, 20), (("held 2 R@1", (0.05, 0.1, None)), ("food R@1", (None, None, 0.3))), 0)
    write_evaluations(run, {step: [held] for step in range(100, 120)})
    table = history_table(evaluation_history(run))
    assert (table.steps, table.num_left_out) == (tuple(range(112, 120)), 14)


def test_curves_of_evaluations_are_by_figure_and_split():
    """Names of splits may have spaces; means have curves too."""
    values = {("a b", "image -> text R@1"): 0.1, ("a b", "zero-shot x"): 0.2, ("laclip-15", "mean zero-shot"): 0.3}
    panels = _evaluation_panels([Measured(8, values), Measured(16, values | {("c", "R@5"): 0.1})])
    assert [panel.title for panel in panels] == [
        "evaluation: image -> text R@1", "evaluation: zero-shot", "evaluation: mean zero-shot"
    ]  # fmt: skip
    assert "a b: x: 0.2 at 8 pairs" in panels[1].alt


def test_results_of_suites_stand_beside_those_of_the_run(run):
    kept = SavedFigures(run / "evaluations" / "step_00000020", "a", 20)
    kept.save("food", "", [Figure("food", "zero-shot top-1", 0.377, 0.01), Figure("held", "zero-shot x", 0.9, 0.1)])
    text = text_of(write_report(run, with_sheets=False))
    assert "37.7%" in text
    assert "90.0%" not in text, "the run's own figure goes before one of the same name"


@pytest.mark.slow
def test_the_command_shows_a_run_that_was_trained(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    assert runs.run("report", folder, "--seed", "3").strip() == str(folder / "report.html")
    text = text_of(folder / "report.html")
    assert "By the weights after step 12." in text
    assert "with seed 3" in text
    assert "first right image: place" in text
    assert (folder / "report" / "map_unseen_clipart.png").exists()
    assert "left out: it was asked to be" in text_of(Path(runs.run("report", folder, "--no-sheets").strip()))
