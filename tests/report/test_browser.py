"""A run's page in a real browser."""

import pytest

from browser import CHROMIUM, Browser
from report_runs import ATTACK, NUM_CONCEPTS
from scaleclip.report import page, sheets
from scaleclip.report.page import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing: apt-get install chromium"),
]

FRAMED = """
[...document.querySelectorAll('.query[data-kind=text] li')].filter(li => {
  const style = getComputedStyle(li.querySelector('img'));
  return parseFloat(style.borderTopWidth) >= 3;
}).map(li => [li.closest('.query').querySelector('.text').title, Number(li.dataset.image)])
"""
TICKED = """
[...document.querySelectorAll('.query[data-kind=image] li')].filter(li => li.querySelector('.mark').innerText.trim())
  .map(li => li.querySelector('.words').title)
"""
# what reaches over the page's right edge without a box of its own that scrolls
OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(element => element.getBoundingClientRect().right > innerWidth + 1
  && !element.closest('.wide, pre, .hits')).map(element => element.outerHTML.slice(0, 80))
"""


@pytest.fixture
def browser(tmp_path):
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def test_the_page_in_a_browser(run, browser, monkeypatch):
    monkeypatch.setattr(sheets, "NUM_QUERIES", NUM_CONCEPTS + 1)  # the attack among them
    made = []
    make_sheet = sheets.make_sheet
    monkeypatch.setattr(page, "make_sheet", lambda *args: made.append(make_sheet(*args)) or made[-1])
    path = write_report(run)
    [sheet] = made
    framed = sorted(
        [sheet.texts[query.number], image]
        for query in sheet.of_texts
        for image, is_right in zip(query.best, query.is_right, strict=True)
        if is_right
    )
    ticked = sorted(
        sheet.texts[text]
        for query in sheet.of_images
        for text, is_right in zip(query.best, query.is_right, strict=True)
        if is_right
    )
    assert framed
    assert ticked
    for width, dark in ((1440, False), (390, False), (390, True)):
        browser.open(path, width, dark)
        assert browser.evaluate("innerWidth") == width
        assert browser.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
        assert browser.evaluate("document.images.length") > len(framed)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OVERFLOWING) == []
        assert sorted(browser.evaluate(FRAMED)) == framed
        assert sorted(browser.evaluate(TICKED)) == ticked
        assert browser.evaluate("document.title") == "run: report"
        assert ATTACK in browser.evaluate("document.body.innerText")
        said = [each for each in browser.said if each["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown")]
        assert said + [each for each in browser.said if each["method"] == "Log.entryAdded"] == []
        requests = [each["params"]["request"]["url"] for each in browser.said if each["method"] == "Network.requestWillBeSent"]
        assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
        paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (not dark)
