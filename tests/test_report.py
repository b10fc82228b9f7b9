"""The report in a browser: it sorts, picks, prints, fits a phone, turns dark, and loads nothing."""

from __future__ import annotations

import html
import re

import numpy as np
import pandas as pd
import pytest
from browser import Visit, launched
from standins import Fragile

import seqdgm as sq
from seqdgm.evaluation.report_figures import rounded

pytest.importorskip("plotly")

NASTY = '<img src=x onerror=alert(1)> & "it\'s" </script><script>alert(2)</script>'

BODY = "getComputedStyle(document.body).backgroundColor"
WIDTH = "document.getElementById('fans')._fullLayout.width"
GROUND = "document.getElementById('fans')._fullLayout.paper_bgcolor"


@pytest.fixture(scope="module")
def data():
    """Six seasonal series, one with a name that would run if it were not escaped."""
    rng = np.random.default_rng(0)
    index = pd.date_range("2015-03-01", periods=60, freq="QS", name="quarter")
    frames = []
    for k in range(6):
        level = 100 + 10 * k + rng.normal(size=60).cumsum()
        y = level + 5 * np.tile([1.0, -1.0, 2.0, -2.0], 15)
        name = NASTY if k == 2 else f"series {k}"
        frames.append(pd.DataFrame({"unique_id": name, "ds": index, "y": y}))
    frames[1].loc[20, "y"] = np.nan
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def result(data):
    models = {
        "SeasonalNaive": sq.SeasonalNaive(season=4),
        "AR & I": sq.ARIMA((0, 1, 1), seasonal=(0, 1, 0, 4)),
        NASTY: sq.SeasonalNaive(season=1),
        "broken": Fragile(),
    }
    with pytest.warns(RuntimeWarning, match="broken failed"):
        return sq.compare(models, data, horizon=4, season=4, n_windows=3, n_samples=200, seed=1)


@pytest.fixture(scope="module")
def path(result, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    result.report(path, title="Quarters <&>")
    return path


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(browser, path):
    """The page, loaded once: its script alone is 5 MB."""
    one = Visit(browser, path)
    yield one
    one.close()


@pytest.fixture
def visit(opened):
    opened.page.emulate_media(media="screen", color_scheme="light")
    opened.page.set_viewport_size({"width": 1180, "height": 900})
    until_plots_follow(opened.page)
    yield opened
    opened.complaints.clear()


@pytest.fixture
def page(visit):
    return visit.page


def rows(page, table="#leaderboard"):
    return page.eval_on_selector_all(
        f"{table} tbody tr", "rows => rows.map(row => row.cells[0].textContent)"
    )


def traces(page, plot="fans"):
    """Names and values that a plot draws."""
    found = page.evaluate(
        "id => document.getElementById(id).data.map(t => [t.name || '', [...t.x], [...t.y]])", plot
    )
    return [(html.unescape(name), x, y) for name, x, y in found]


def test_it_loads_nothing_and_says_nothing(visit):
    assert visit.requests == []
    assert visit.complaints == []


def test_its_policy_forbids_network_and_foreign_scripts(visit):
    one = visit
    one.page.evaluate("fetch('https://example.org/x').catch(() => 0)")
    one.page.evaluate(
        "const s = Object.assign(document.createElement('script'), {text: 'found = 1'});"
        "document.body.append(s); s.remove()"
    )
    assert one.requests == []
    assert one.page.evaluate("typeof found") == "undefined"
    assert sum("Content Security Policy" in text for text in one.complaints) >= 2


@pytest.mark.parametrize("column", ["CRPS", "MASE", "log score", "model"])
def test_the_leaderboard_sorts_by_a_click(page, result, column):
    name = {"log score": "log_score"}.get(column, column)
    head = page.locator("#leaderboard thead th", has=page.get_by_role("button", name=column))
    head = head.first
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    if name == "model":
        assert rows(page) == sorted(rows(page), key=str.lower)
        return
    values = result.table[name].sort_values(kind="stable", na_position="last")
    assert rows(page) == list(values.index)
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    values = result.table[name].sort_values(ascending=False, kind="stable", na_position="last")
    assert rows(page) == list(values.index)  # what failed stays at the end
    assert rows(page)[-1] == "broken"
    others = page.locator("#leaderboard thead th[aria-sort=ascending]")
    assert others.count() == 0


def test_the_pickers_change_what_is_drawn(page, result, data):
    frame = result.forecasts

    def expected(name, window):
        block = frame[frame["unique_id"] == name]
        cutoffs = sorted(block["cutoff"].unique())
        return block[block["cutoff"] == cutoffs[window]]

    def drawn(kind):
        return [line for line in traces(page) if line[0] == kind]

    best = str(result.table.index[0])
    for k, window in ((0, 2), (4, 2), (4, 0)):
        page.select_option("#fans-series", str(k))
        page.select_option("#fans-window", str(window))
        block = expected(f"series {k}", window)
        (held,) = drawn("held out")
        np.testing.assert_allclose(held[2], block["y"], rtol=1e-5)
        assert [pd.Timestamp(x) for x in held[1]] == list(block["ds"])
        (line,) = drawn(best)
        assert line[2][1:] == rounded(block[best])
        (past,) = drawn("history")
        known = data[(data["unique_id"] == f"series {k}") & (data["ds"] <= block["cutoff"].iloc[0])]
        np.testing.assert_allclose(past[2], known["y"], rtol=1e-5)
    other = str(result.table.index[2])
    assert drawn(other) == []
    page.get_by_role("checkbox", name=other, exact=True).check()
    (line,) = drawn(other)
    assert line[2][1:] == rounded(block[other])
    page.get_by_role("checkbox", name=other, exact=True).uncheck()
    assert drawn(other) == []
    page.get_by_role("checkbox", name="broken").check()
    assert page.locator("#fans-missing").text_content() == "No forecast here by broken."


def test_states_follow_their_pickers(page, result):
    names = page.eval_on_selector_all("#states-model option", "all => all.map(o => o.textContent)")
    assert "AR & I" in names
    page.select_option("#states-model", label="AR & I")
    page.select_option("#states-series", label="series 3")
    shown = page.eval_on_selector_all("#states figcaption", "all => all.map(f => f.textContent)")
    own = result.states
    own = own[(own["model"] == "AR & I") & (own["unique_id"] == "series 3")]
    assert shown == list(own["state"].unique())
    level = own[(own["state"] == shown[0]) & (own["kind"] == "smoothed")]
    drawn = page.evaluate("[...document.querySelector('#states .plot').data[2].y]")
    assert drawn == rounded(level["mean"])


def test_names_are_shown_as_they_are(page, result):
    assert page.title() == "Quarters <&>"
    assert NASTY in rows(page)
    options = page.eval_on_selector_all("#fans-series option", "all => all.map(o => o.textContent)")
    assert options == [f"series {k}" if k != 2 else NASTY for k in range(6)]
    page.select_option("#fans-series", "2")
    page.get_by_role("checkbox", name=NASTY, exact=True).check()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    ticks = page.eval_on_selector_all("#ranking .ytick text", "all => all.map(t => t.textContent)")
    assert any(text.startswith("<img src=x") for text in ticks)


def test_it_prints(visit):
    one = visit
    one.page.emulate_media(color_scheme="dark")
    until_plots_follow(one.page)
    width = one.page.evaluate(WIDTH)
    printed = one.page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", printed))
    assert 3 <= pages <= 14
    assert one.complaints == []
    # On paper it is light, whatever the screen is, and the screen is as it was afterwards.
    until_plots_follow(one.page)
    one.page.wait_for_function(f"() => {WIDTH} > 900")
    assert one.page.evaluate(WIDTH) == width
    one.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert luminance(one.page.evaluate(GROUND)) > 0.95
    assert luminance(one.page.evaluate(BODY)) > 0.95
    one.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert luminance(one.page.evaluate(GROUND)) < 0.03
    one.page.emulate_media(media="print")
    assert luminance(one.page.evaluate(BODY)) > 0.95
    until_plots_follow(one.page)
    one.page.emulate_media(media="screen", color_scheme="dark")
    until_plots_follow(one.page)


@pytest.mark.parametrize("width", [360, 768])
def test_it_fits_a_narrow_screen(page, width):
    page.set_viewport_size({"width": width, "height": 740})
    page.wait_for_function(
        "width => document.querySelector('#fans svg').clientWidth < width", arg=width
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("innerWidth") == width
    boxes = page.eval_on_selector_all(
        ".plot, .scroll, select, h1, h2, p",
        "all => all.map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])",
    )
    assert min(left for left, _ in boxes) >= 0
    assert max(right for _, right in boxes) <= width
    if width == 360:
        box = page.locator("#leaderboard .scroll")
        assert box.evaluate("e => e.scrollWidth > e.clientWidth")
        box.evaluate("e => { e.scrollLeft = 200 }")
        # The names stay while the numbers move.
        assert page.locator("#leaderboard tbody th").first.bounding_box()["x"] >= 0
    sizes = page.eval_on_selector_all(
        "body :is(p, td, th, label, summary, a)",
        "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))",
    )
    assert min(sizes) >= 12


def test_dark_mode_is_dark_and_the_plots_follow(page):
    page.emulate_media(color_scheme="dark")
    until_plots_follow(page)

    def colours(plot):
        found = page.evaluate(
            "id => { const l = document.getElementById(id)._fullLayout;"
            " return [l.paper_bgcolor, l.plot_bgcolor, l.font.color, l.xaxis.tickfont.color] }",
            plot,
        )
        return [luminance(one) for one in found]

    body = [
        luminance(page.evaluate(f"getComputedStyle(document.body).{which}"))
        for which in ("backgroundColor", "color")
    ]
    assert body[0] < 0.03
    assert contrast(*body) > 7
    for plot in ("fans", "ranking"):
        ground, inside, ink, ticks = colours(plot)
        assert ground == inside == body[0]
        assert contrast(ground, ink) > 7
        assert contrast(ground, ticks) > 4.5
    page.emulate_media(color_scheme="light")
    until_plots_follow(page)
    for plot in ("fans", "ranking"):
        ground, inside, ink, ticks = colours(plot)
        assert ground == inside > 0.95
        assert contrast(ground, ink) > 7
        assert contrast(ground, ticks) > 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_series_colour_stands_out(page, scheme):
    page.emulate_media(color_scheme=scheme)
    names = [f"--c{k}" for k in range(8)] + ["--ground"]
    *lines, ground = (
        luminance(
            page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{name}')")
        )
        for name in names
    )
    assert min(contrast(line, ground) for line in lines) > 3  # WCAG 2.2, criterion 1.4.11


def until_plots_follow(page):
    """Wait until the plots have the ground of the page: a change of media comes with a frame."""
    for _ in range(100):
        if luminance(page.evaluate(GROUND)) == luminance(page.evaluate(BODY)):
            return
        page.wait_for_timeout(50)
    raise AssertionError("the plots do not follow the page")


def luminance(colour):
    """Relative luminance of WCAG 2."""
    colour = colour.strip()
    if colour.startswith("#"):
        values = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    else:
        values = [float(value) for value in re.findall(r"[\d.]+", colour)[:3]]
    parts = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(values) / 255
    ]
    return float(np.dot([0.2126, 0.7152, 0.0722], parts))


def contrast(a, b):
    low, high = sorted((a, b))
    return (high + 0.05) / (low + 0.05)
