"""The page of a score shows what was found, and runs in a browser."""

import html
import re
from pathlib import Path

import pytest
import yaml

from browser import CHROMIUM, Browser
from captions_job import Made, by_rule, write_job
from evaluation_models import tiny_encoder
from helpers import make_sample, write_tar
from report_runs import ATTACK
from scaleclip.captioning.made_texts import Origin, open_made_texts
from scaleclip.captioning.reading import Wanted
from scaleclip.captioning.score import score
from scaleclip.captioning.scored import Score
from scaleclip.config_io import load_config
from scaleclip.data.source import open_shards
from scaleclip.report.score_page import recipe, write_score_page

# what reaches over the page's right edge without a box of its own that scrolls
OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(element => element.getBoundingClientRect().right > innerWidth + 1
  && !element.closest('.wide, pre')).map(element => element.outerHTML.slice(0, 80))
"""
# boxes that hide a part of their table, and cells that no heading names
CUT = """
[...document.querySelectorAll('.wide, pre')].filter(box => box.scrollWidth > box.clientWidth)
  .concat([...document.querySelectorAll('.wide td')].filter(cell => cell.innerText && !cell.dataset.column))
  .map(element => element.outerHTML.slice(0, 80))
"""
MARKED = """
[...document.querySelectorAll('dt .reason')].map(mark => [mark.innerText.replace('not used: ', ''),
  mark.closest('dt').dataset.source])
"""


def attacked(number: int, key: str, caption: str) -> dict[str, Made]:
    """By rule, but that every third text attacks the page or is in another script."""
    made = by_rule(number, key, caption)
    if number % 3 == 0:
        made["mscoco"] = (ATTACK, None)
    if number % 3 == 1:
        made["mscoco"] = ("\u0642\u0637\u0629 \u0639\u0644\u0649 \u0633\u062c\u0627\u062f\u0629", "wrong_script")
    return made


@pytest.fixture
def scored(shards, cache, tmp_path, monkeypatch) -> Score:
    """All that a score may hold: failed texts, a bad image, a missing shard."""
    monkeypatch.setattr("scaleclip.captioning.score.DISTINCT_OF", 50)
    write_tar(shards / "00001.tar", [make_sample(9, jpg=b"no image"), *map(make_sample, (10, 11, 12))])
    job = write_job(tmp_path / "out", f"{shards}/*.tar", attacked, complete=False, skip=(3,))
    manifest, reader = open_shards("--data", [f"{shards}/*.tar"], None, cache)
    wanted = Wanted(manifest, reader, "txt", ("jpg",))
    return score(open_made_texts(job, manifest), wanted, tiny_encoder(tmp_path), "a tiny model", lambda *_: None)


def text_of(path: Path) -> str:
    """A page's words."""
    body = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def test_the_page_says_what_was_found(scored, tmp_path):
    path = write_score_page(scored, tmp_path, "my captions")
    assert path == tmp_path / "score.html"
    text = text_of(path)
    human = scored.sources[0]
    for said in (
        "my captions partial", "a rule of the tests", "a tiny model", "25 samples read", "not usable: wrong_script",
        f"{100 * human.nearness.nearer.value:.1f} ({100 * human.nearness.nearer.low:.1f} to", f"{human.distinct[1]:.3f}",
        "are of all 25 samples read: counts are of all their texts", "distinct-n are of 25 samples drawn with seed 0.",
        "1 of 4 shards has no texts: the job is not complete", "1 image that cannot be used, of those encoded:",
        "no image that can be used", "p = 0.8", "rules of thumb", "not used: loop", "fallback: caption",
    ):  # fmt: skip
        assert said in text, said
    content = path.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", content), "the page needs nothing else"
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]+>", content))
    assert "<script" not in content
    assert "&lt;script&gt;" in content


def test_a_key_may_be_no_utf8(scored, tmp_path):
    first = scored.sheet[0]
    path = write_score_page(scored._replace(sheet=[first._replace(key="image-\udcff")]), tmp_path, "out")
    assert "image-?" in text_of(path)


def test_without_a_model_and_without_faults_that_is_said(shards, cache, tmp_path):
    job = write_job(tmp_path / "out", f"{shards}/*.tar", lambda number, key, caption: {"a": (f"new {caption}", None)})
    manifest, reader = open_shards("--data", [f"{shards}/*.tar"], None, cache)
    made = open_made_texts(job, manifest)
    found = score(made, Wanted(manifest, reader, "txt", ("jpg",)), None, "", lambda *_: None)
    text = text_of(write_score_page(found, tmp_path, "out"))
    for said in (
        "out complete Score of",
        "Not measured: no model was given",
        "No model looked at the images",
        "of which no source has enough words",
        "None: every text can be used.",
        "None: every shard",
    ):
        assert said in text, said


def test_the_badge_says_no_more_than_is_known(scored, tmp_path):
    whole = scored._replace(missing_shards=0, bad_images={}, origin=scored.origin._replace(complete=True))
    loose = Origin()
    for found, badge in (
        (whole, ["complete"]),
        (whole._replace(unknown_rows=1), ["partial"]),
        (whole._replace(origin=whole.origin._replace(complete=False)), ["partial"]),
        (whole._replace(origin=Origin(sidecar="there")), []),
        (whole._replace(origin=Origin(sidecar="there"), missing_shards=1), ["partial"]),
        (whole._replace(origin=loose), []),
        (whole._replace(origin=loose, unknown_rows=1), []),
    ):
        content = write_score_page(found, tmp_path, "out").read_text()
        assert re.findall(r'<span class="state [a-z]+">(.*?)</span>', content) == badge


def test_the_advice_is_a_configuration(scored, shards, tmp_path):
    tree = yaml.safe_load(recipe(scored).replace("NAME", "mine"))
    tree["data"]["sources"]["mine"]["shards"] = f"{shards}/*.tar"
    path = tmp_path / "advised.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    assert dict(config.data.views[0].texts) == {"caption": 0.3333, "human": 0.3333, "mscoco": 0.3333}
    assert config.data.sources["mine"].texts["human"] == "made:human"
    assert recipe(scored._replace(origin=scored.origin._replace(sidecar=""))) == ""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing: apt-get install chromium")
def test_the_page_in_a_browser(scored, tmp_path):
    path = write_score_page(scored, tmp_path, "my captions")
    marked = sorted(
        [
            *([made.reason, source] for shown in scored.sheet for source, made in shown.texts.items() if made.reason),
            *([reason, source] for source, reason, _ in scored.failed),
        ]
    )
    assert marked
    browser = Browser(tmp_path / "profile")
    try:
        for width, dark in ((1440, False), (390, False), (390, True)):
            browser.open(path, width, dark)
            assert browser.evaluate("innerWidth") == width
            assert browser.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
            assert browser.evaluate("document.images.length") > len(scored.sheet)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(OVERFLOWING) == []
            assert browser.evaluate(CUT) == [], "every cell is on the screen, with the name of its column"
            assert sorted(browser.evaluate(MARKED)) == marked
            assert browser.evaluate("document.title") == "my captions: score"
            assert ATTACK in browser.evaluate("document.body.innerText")
            said = [each["method"] for each in browser.said]
            assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"} & set(said)
            requests = [
                each["params"]["request"]["url"] for each in browser.said if each["method"] == "Network.requestWillBeSent"
            ]
            assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
            paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (not dark)
    finally:
        browser.close()
