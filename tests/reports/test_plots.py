"""Plots as SVG: a heat map's cells and names, and paper and ink that change together."""

from xml.etree import ElementTree

import pytest

from lit_gpt.reports.plots import CELL, Panel, Series, heat_map, save_svg, side_by_side
from tests.reports.test_report import browse

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def cells_of(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "cell"]


def words_of(root: ElementTree.Element) -> list[str]:
    return [element.text for element in root.iter(f"{SVG}text")]


def test_a_heat_map_has_a_cell_for_each_pair_with_its_percent_and_zeros_stay_empty():
    root = parse(heat_map([[1, 0], [0.254, 0.746]], ["水", "<b>"], "key", "query"))
    cells = cells_of(root)
    assert [cell.get("fill-opacity") for cell in cells] == ["1", "0", "0.254", "0.746"]
    x, y = ([int(cell.get(name)) for cell in cells] for name in "xy")
    assert (x[1] - x[0], x[2], y[1], y[2] - y[0]) == (CELL, x[0], y[0], CELL)
    assert words_of(root) == ["key", "query", "水", "水", "100", "<b>", "<b>", "25", "75"]


def test_a_share_too_small_for_a_percent_is_still_told_from_none():
    assert words_of(parse(heat_map([[0.001]], ["a"], "x", "y")))[-1] == "0"
    assert words_of(parse(heat_map([[0.0]], ["a"], "x", "y")))[-1] == "a"


def test_a_heat_map_makes_room_for_its_longest_name_and_wide_characters():
    starts = [
        int(cells_of(parse(heat_map([[0.5]], [name], "x", "y")))[0].get("x"))
        for name in ("a", "aaaa", "水水水水")
    ]
    assert starts[1] - starts[0] == 3 * 7
    assert starts[2] - starts[1] == 4 * 5


def test_rows_and_names_must_be_as_many():
    with pytest.raises(ValueError, match="shorter"):
        heat_map([[1.0]], ["a", "b"], "x", "y")


def test_ink_follows_paper_in_the_dark_and_no_other_ink_is_used():
    panel = Panel("step", "loss", [Series([(0, 1), (1, 2)], "line")])
    for svg in (side_by_side([panel]), heat_map([[1.0]], ["a"], "x", "y")):
        root = parse(svg)
        style = root.find(f"{SVG}style").text
        assert "(prefers-color-scheme: dark) { .lit-gpt-plot { color: #f2f1ec }" in style
        assert ".paper { fill: #1d1d1b }" in style
        assert (root.get("class"), root.get("fill")) == ("lit-gpt-plot", "currentColor")
        paper, *others = root.iter(f"{SVG}rect")
        assert (paper.get("class"), paper.get("fill")) == ("paper", "white")
        inks = {element.get("stroke") for element in [*others, *root.iter(f"{SVG}polyline")]}
        assert inks <= {"currentColor", "#1f77b4"}


def test_panels_stand_side_by_side_in_a_square_and_the_file_holds_the_same(tmp_path):
    panels = [Panel(f"panel {n}", "y", [Series([(0, 1), (1, 2)], "dot")]) for n in range(3)]
    svg = side_by_side(panels)
    places = [g.get("transform") for g in parse(svg).iter(f"{SVG}g")]
    assert places == ["translate(0 0)", "translate(480 0)", "translate(0 340)"]
    assert parse(svg).get("viewBox") == "0 0 960 680"
    save_svg(panels, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8") == svg


@pytest.mark.parametrize(
    ("options", "paper", "half"),
    [
        ([], (255, 255, 255), (143, 187, 217)),
        (["--force-dark-mode"], (29, 29, 27), (30, 74, 103)),
    ],
    ids=["light", "dark"],
)
def test_a_browser_paints_the_cells_on_the_paper_of_its_colour_scheme(
    tmp_path, options, paper, half
):
    """As an image in a page, which is how notebooks show it."""
    image = pytest.importorskip("PIL.Image")
    svg = heat_map([[1, 0], [0.5, 0.5]], ["a", "b"], "key", "query")
    (tmp_path / "map.svg").write_text(svg, encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text('<meta name="color-scheme" content="light dark"><img src="map.svg">')
    shot = tmp_path / "shot.png"
    browse(page, tmp_path, "--window-size=300,300", f"--screenshot={shot}", *options)
    shot = image.open(shot).convert("RGB")
    x, y = (8 + int(cells_of(parse(svg))[0].get(name)) for name in "xy")  # of a page's margin
    inside = [(x + dx + 4, y + dy + 4) for dy in (0, CELL) for dx in (0, CELL)]  # beside the words
    found = [shot.getpixel(place) for place in [(9, 9), *inside]]
    for color, expected in zip(found, [paper, (31, 119, 180), paper, half, half], strict=True):
        assert color == pytest.approx(expected, abs=1)
