"""Charts: what is drawn of a series, and what a browser makes of a page."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.reports.charts import Chart, Series
from lit_gpt.reports.html import charts_page
from lit_gpt.reports.report import Run, comparison_page, run_page
from tests.reports.test_report import HOSTILE, made_up

LIGHT = {"page": "f9f9f7", "validation": "2a78d6", "training": "eb6834"}
DARK = {"page": "131312", "validation": "5b9ff0", "training": "f08a5d"}


def test_a_long_line_keeps_its_extremes_and_leaves_out_what_is_not_finite():
    points = [(step, 5.0) for step in range(3000)]
    points[1234] = (1234, 9.0)
    points[77] = (77, float("nan"))
    points[78] = (78, float("inf"))
    drawn = Series("", points).drawn()
    assert len(drawn) <= 802
    assert (1234, 9.0) in drawn
    assert all(value in (5.0, 9.0) for _, value in drawn)
    assert max(value for _, value in Series("", points, "faint").drawn()) < 6


def test_points_share_a_row_by_their_x_but_no_dot_hides_another():
    line = Series("line", [(0, 1.0), (2, 3.0)])
    dots = Series("dots", [(2, 5.0), (2, 6.0), (4, 7.0)], "dots")
    chart = Chart("Title", [line, dots])
    steps, *columns = json.loads(chart.spec)["data"]
    assert steps == [0, 2, 2, 4]
    assert columns == [[None, 5, 6, 7], [1, 3, None, None]]  # the first series last: on top
    assert chart.description == (
        "Title: line from 1.000 at step 0 to 3.000 at step 2; "
        "dots from 5.000 at step 2 to 7.000 at step 4"
    )
    assert not Chart("Title", [Series("no points", [])])


@pytest.fixture
def show(browser: Any, tmp_path: Path):
    """`show(page, color_scheme="dark")` opens a page; what it complained about and asked for."""

    def open_page(content: str, **options: Any) -> tuple[Any, list[str], list[str]]:
        path = tmp_path / "page.html"
        path.write_text(content, encoding="utf-8")
        page = browser.new_page(**options)
        problems: list[str] = []
        requests: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert requests == [path.as_uri()]
        return page, problems, requests

    return open_page


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_each_point_is_where_its_step_and_loss_belong(show, tmp_path, colors):
    """In the colour of its curve, on the paper of the colour scheme."""
    image = pytest.importorskip("PIL.Image")
    scheme = "light" if colors is LIGHT else "dark"
    page, problems, _ = show(
        run_page(made_up()), color_scheme=scheme, viewport={"width": 1000, "height": 800}
    )
    page.screenshot(path=tmp_path / "shot.png")
    shot = image.open(tmp_path / "shot.png").convert("RGB")
    paper, blue, orange = (tuple(bytes.fromhex(color)) for color in colors.values())
    assert problems == []
    assert shot.getpixel((3, 3)) == paper
    box = page.locator(".main .u-over").bounding_box()
    curves = made_up().history.curves

    def places(color: tuple[int, int, int]) -> set[tuple[int, int]]:
        xs = range(int(box["x"]) - 8, int(box["x"] + box["width"]) + 8)
        ys = range(int(box["y"]) - 8, int(box["y"] + box["height"]) + 8)
        return {(x, y) for x in xs for y in ys if shot.getpixel((x, y)) == color}

    found = places(orange)  # alone in its corners: from its ends follows all the rest
    left = min(x for x, _ in found) + 3
    right = max(x for x, _ in found) - 3
    top = min(y for _, y in found) + 3
    bottom = max(y for _, y in found) - 3
    (start, high), *_, (end, low) = curves["train/eval_loss"]

    def place_of(step: int, loss: float) -> tuple[int, int]:
        x = left + (right - left) * (step - start) / (end - start)
        return round(x), round(top + (bottom - top) * (high - loss) / (high - low))

    for name, color in (("val/loss", blue), ("train/eval_loss", orange)):
        there = places(color)
        for step, loss in curves[name]:
            x, y = place_of(step, loss)
            near = {(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
            assert near & there, (name, step)
    x, y = place_of(150, 3.8)  # the best step has a ring
    ring = {(x + i, y + j) for i in (-7, -6, -5, 5, 6, 7) for j in (-1, 0, 1)}
    assert ring & places(blue)


def test_the_pointer_shows_step_and_values_and_the_scheme_may_change(show, tmp_path):
    page, problems, _ = show(run_page(made_up()))
    box = page.locator(".main .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    tip = page.locator(".main .tip")
    assert tip.inner_text().split("\n") == ["step 100", "validation 4.400", "training 3.000"]
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 800})
    # Not wait_for_function: its polling evaluates text in the page, which the page forbids.
    canvas = page.locator(".main canvas").first
    deadline = time.monotonic() + 10
    while canvas.evaluate("canvas => canvas.clientWidth") >= 390 and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert problems == []


def test_the_pages_script_runs_and_no_other(show):
    run = made_up(samples=[(200, [HOSTILE])])
    content = run_page(Run(HOSTILE, run.history, {}))
    injected = "<script>document.title = 'taken'</script></body>"
    for attacked in (content, content.replace("</body>", injected)):
        page, problems, _ = show(attacked)
        assert page.locator("canvas").count() == 1
        assert page.title() != "taken"
        assert page.get_by_role("img").first.get_attribute("aria-label").startswith("Loss, nats")
        refused = [p for p in problems if "Content Security Policy" in p]
        assert len(refused) == len(problems) == (attacked is not content)


def test_charts_of_dots_names_and_logarithmic_axes_are_drawn(show, tmp_path):
    dots = [Series("completed", [(0, 1.5), (1, 1.25), (1, 1.5)], "dots")]
    rates = [(10**-n, 2.0 + n) for n in range(6, 0, -1)]
    line = Series("loss", rates, mark=rates[3], note="suggestion: 0.001")
    charts = [
        Chart("Style", dots, x_name="style", x_names=("classic", "modern")),
        Chart("Loss", [line], x_name="learning rate", log_x=True, y_range=(0, 9), main=True),
        Chart("One trial", [Series("one", [(1, 2.0)], "rings")], x_name="trial"),
        Chart("Flat", [Series("flat", [(1, 2.0), (2, 2.0)], "steps")]),
    ]
    content = charts_page("charts.html", title="Charts", subtitle="All kinds", charts=charts)
    page, problems, _ = show(content)
    assert page.locator("canvas").count() == 4
    assert problems == []
    box = page.locator(".small .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 30)
    assert page.locator(".small .tip").first.inner_text().startswith("modern\n1.")
    box = page.locator(".main .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 30)
    assert page.locator(".main .tip").inner_text() == "learning rate 0.001\n5.000"


def test_a_comparison_of_ten_long_runs_is_a_page_of_half_a_megabyte(show):
    steps = range(0, 100_000, 100)
    curves = {
        name: [(step, 2 + (step * 7919 % 1000) / 1000) for step in steps]
        for name in ("val/loss", "train/eval_loss", "val/bits_per_byte", "learning_rate")
    }
    runs = [Run(f"run {n}", made_up(curves=curves).history, {}) for n in range(10)]
    content = comparison_page(runs)
    assert len(content) < 700_000
    page, problems, _ = show(content)
    assert page.locator("canvas").count() == 4
    assert problems == []
