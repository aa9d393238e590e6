"""The report that the program writes of a study, with matplotlib's own pictures, opened in Chromium.

Slow, as all figures are drawn. Without Chromium it is skipped, or fails, as test_report_browser.py says, and
Q8JAX_SCREENSHOTS=FOLDER keeps pictures there, one of every plot.
"""

import io
import json
import os
from pathlib import Path

import matplotlib.image
import pytest
import synthetic_study
from chromium import Chromium, find

from experiments import figures

pytestmark = [pytest.mark.browser, pytest.mark.slow]
HEAT, AMAX = "#plot-sqnr_fp8", "#plot-amax_fp8"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The program's figures of a study of two precisions, one with telemetry."""
    folder = tmp_path_factory.mktemp("study")
    study = synthetic_study.write(folder / "study", arms=("bf16", "fp8"), seeds=(0, 1), telemetry=("fp8",))
    synthetic_study.write_sensitivity(study / "whatif.json", "bf16-seed0")
    synthetic_study.write_benchmark(study / "benchmark.json", works=20)
    figures.write(str(study), folder / "out", "icml")
    return folder / "out"


@pytest.fixture(scope="module")
def page(out, tmp_path_factory):
    """The report, open on a desktop; whatever the tests do to it leaves the console empty."""
    browser = Chromium(find(), tmp_path_factory.mktemp("browser"))
    try:
        browser.screen(1280, 800)
        browser.open(out / "report.html")
        yield browser
        assert browser.console == []
        assert browser.requests == [(out / "report.html").as_uri()]
    finally:
        browser.close()


# Of every plot: its name, the size of its picture on the screen, and the ratio that the picture says it has.
SIZES = """Array.from(document.querySelectorAll('article.plot'), plot => {
    const svg = plot.querySelector('.view svg'), box = svg.getBoundingClientRect();
    return [plot.id, box.width, box.height, svg.viewBox.baseVal.width / svg.viewBox.baseVal.height];
})"""
# What a picture refers to and does not hold itself, so that it is not drawn, or drawn as in another picture.
DANGLING = """Array.from(document.querySelectorAll('.view svg'), svg => Array.from(svg.querySelectorAll('*'), element =>
    Array.from(element.attributes, ({name, value}) => name.endsWith('href') && value.startsWith('#')
        ? [value.slice(1)] : Array.from(value.matchAll(/url\\(["']?#([^"')]+)/g), match => match[1])).flat()
        .filter(id => !svg.contains(document.getElementById(id)))).flat()).flat()"""


def test_every_figure_is_there_in_its_proportions(page, out):
    plots = page.run(SIZES)
    assert len({name for name, *_ in plots}) == len(plots) == len(list(out.glob("*.svg"))) > 10
    assert {"plot-sensitivity", "plot-roofline"} < {name for name, *_ in plots}
    assert {HEAT.removeprefix("#"), AMAX.removeprefix("#")} <= {name for name, *_ in plots}
    for name, width, height, ratio in plots:
        assert 200 < width <= 1280 and height > 80, name
        assert width / height == pytest.approx(ratio, rel=0.01), name
    assert not page.run("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def test_pictures_hold_what_they_refer_to_and_heat_maps_are_decoded(page):
    assert page.run("document.querySelectorAll('.view svg use').length") > 100
    assert page.run(DANGLING) == []
    images = "Array.from(document.querySelectorAll('.view svg image'))"
    assert page.run(f"Promise.all({images}.map(image => image.decode().then(() => 1))).then(all => all.length)") > 4


def test_every_figure_has_ink(page, tmp_path):
    folder = Path(os.environ.get("Q8JAX_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for name, *_ in page.run(SIZES):
        page.middle(f"#{name} .view")
        x, y, width, height = page.run(
            f"(box => [box.x, box.y, box.width, box.height])(document.querySelector('#{name} .view svg')"
            ".getBoundingClientRect())"
        )
        content = page.picture()
        (folder / f"{name}.png").write_bytes(content)
        seen = matplotlib.image.imread(io.BytesIO(content))[..., :3]
        seen = seen[max(0, round(y)) : round(y + height), round(x) : round(x + width)]
        assert (seen.min(axis=-1) < 0.5).mean() > 0.01, name  # lines and letters; a frame alone has less
        colourful = seen.max(axis=-1) - seen.min(axis=-1) > 0.2
        assert colourful.mean() > 0.002, name


def test_one_plot_zooms_and_the_others_stay(page):
    box = lambda plot: page.run(f"document.querySelector('{plot} svg').getAttribute('viewBox')")
    whole, other = box(HEAT), box(AMAX)
    left, top, width, height = map(float, whole.split())
    page.click(f"{HEAT} [data-do=in]")
    assert list(map(float, box(HEAT).split())) == pytest.approx(
        [left + width / 6, top + height / 6, width / 1.5, height / 1.5], abs=0.1
    )
    assert box(AMAX) == other
    page.click(f"{HEAT} [data-do=reset]")
    assert box(HEAT) == whole


def test_numbers_of_a_plot_are_those_that_are_written(page, out):
    page.click(f"{HEAT} .numbers > summary")
    page.settle()
    groups = json.loads((out / "numbers.json").read_text())["plots"][HEAT.removeprefix("#plot-")]
    count = sum(len(group["columns"]["sqnr"]) for group in groups)
    assert page.run(f"document.querySelector('{HEAT} .numbers > summary').textContent") == f"Numbers ({count} rows)"
    last = "row => Number(row.cells[row.cells.length - 1].textContent)"
    shown = page.run(f"Array.from(document.querySelectorAll('{HEAT} .numbers tbody tr'), {last})")
    assert shown[:60] == pytest.approx(groups[0]["columns"]["sqnr"]) and len(shown) == 100
