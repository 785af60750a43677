"""The pages in a real browser: they render, fetch nothing, and read well at every width."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune import files
from loratune.report.build import write_report, write_runs_report

from .browser import Browser, Page
from .planted import EVERYTHING_HOSTILE, comparison, write_run

KINDS = ["run", "comparison", "several runs", "hostile run", "hostile comparison"]
WIDTHS = [390, 1280]


def write_page(kind: str, folder: Path) -> Path:
    if kind == "run":
        return write_report([write_run(folder / "run")])
    if kind == "several runs":
        runs = [write_run(folder / name, variant=name, seed=n) for n, name in enumerate("abcdefg")]
        return write_runs_report(runs, folder / "runs.html")
    if kind == "hostile run":
        hostile = {"text": EVERYTHING_HOSTILE, "variant": EVERYTHING_HOSTILE}
        return write_report([write_run(folder / "run", module=EVERYTHING_HOSTILE, **hostile)])
    label = EVERYTHING_HOSTILE if kind == "hostile comparison" else ""
    text = label or "Which country is Sarney in?"
    files.write_json(folder / "comparison.json", comparison(text=text, label=label).to_dict())
    return write_report([folder])


@pytest.fixture(scope="module", params=KINDS)
def page(
    request: pytest.FixtureRequest, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    path = write_page(request.param, tmp_path_factory.mktemp("page"))
    return browser.open(path.as_uri())


def test_nothing_is_fetched_and_the_console_stays_empty(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.body.offsetHeight") > 1000
    assert len(page.requests) == 1
    assert page.requests[0].startswith("file:")
    assert page.errors == []


def test_no_element_of_the_page_can_act(page: Page) -> None:
    active = "script,img,iframe,object,embed,link,base,form,input,button,textarea,b[onclick],i,x"
    assert page.evaluate(f"document.querySelectorAll('{active}').length") == 0
    handlers = (
        "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes])"
        ".filter(a => a.name.startsWith('on') || /javascript:/i.test(a.value)"
        " && !['aria-label'].includes(a.name)).map(a => a.name + '=' + a.value)"
    )
    assert page.evaluate(handlers) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_never_scrolls_sideways(page: Page, width: int) -> None:
    page.resize(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_no_label_of_a_chart_covers_another_or_leaves_it(page: Page, width: int) -> None:
    page.resize(width)
    overlaps = """
      [...document.querySelectorAll('svg')].flatMap(svg => {
        const frame = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
        const out = texts.filter(([t, r]) => r.left < frame.left - 2 || r.right > frame.right + 2
          || r.top < frame.top - 2 || r.bottom > frame.bottom + 2)
          .map(([t]) => 'out: ' + t.textContent);
        const covered = [];
        texts.forEach(([t, a], i) => texts.slice(i + 1).forEach(([u, b]) => {
          const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
          const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (wide > 1 && high > 3) covered.push(t.textContent + ' / ' + u.textContent);
        }));
        return [...out, ...covered];
      })
    """
    assert page.evaluate(overlaps) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_drawings_stand_out_from_the_paper(page: Page, dark: bool) -> None:
    page.resize(1280, dark=dark)
    contrasts = """
      (() => {
        const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(v => {
          v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
          return (x + 0.05) / (y + 0.05); };
        const paper = getComputedStyle(document.body).backgroundColor;
        const low = [];
        for (const [css, property, least] of [
          ['p', 'color', 4.5], ['th', 'color', 4.5], ['td', 'color', 4.5], ['a', 'color', 4.5],
          ['summary', 'color', 4.5], ['figcaption', 'color', 4.5], ['svg text', 'fill', 4.5],
          ['svg .stroke', 'color', 3], ['svg .mark', 'color', 3], ['svg .axis', 'stroke', 3]])
          for (const e of document.querySelectorAll(css)) {
            const value = ratio(getComputedStyle(e)[property], paper);
            if (value < least) low.push(css + ' ' + value.toFixed(2));
          }
        return [...new Set(low)];
      })()
    """
    assert page.evaluate(contrasts) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark


def test_a_printed_page_is_light_and_leaves_out_what_only_clicks_open(page: Page) -> None:
    page.resize(794, dark=True, media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    shown = "[...document.querySelectorAll('nav, details.long')].map(e => e.offsetHeight)"
    assert set(page.evaluate(shown)) <= {0}
    assert page.pdf().startswith(b"%PDF")
    page.resize(1280)


def test_pointing_at_a_chart_shows_the_values_there(page: Page) -> None:
    titles = page.evaluate("[...document.querySelectorAll('svg title')].map(t => t.textContent)")
    assert titles
    assert all(any(letter.isdigit() for letter in title) for title in titles)
    labels = page.evaluate(
        "[...document.querySelectorAll('svg')].map(s => [s.getAttribute('role'), s.ariaLabel])"
    )
    assert labels
    assert all(role == "img" and label for role, label in labels)


def test_the_browser_would_tell_if_a_page_did_what_it_must_not(
    browser: Browser, tmp_path: Path
) -> None:
    path = write_page("run", tmp_path)
    spoilt = path.read_text(encoding="utf-8").replace(
        "<main>", '<main><script>alert(1)</script><img src="https://example.invalid/x.png">'
    )
    path.write_text(spoilt, encoding="utf-8")
    page = browser.open(path.as_uri())
    page.screenshot(390)
    assert any("script" in error.lower() for error in page.errors)
    assert any("img-src" in error or "image" in error.lower() for error in page.errors)
