"""The HTML report as a reader has it: opened from disk in Chromium, with mouse, keyboard and fingers.

This one is small and written by hand; that of a study is in test_report_of_study.py.

Without Chromium these tests are skipped; with Q8JAX_REQUIRE_BROWSER=1, as .ci/run sets it, they fail.
Q8JAX_SCREENSHOTS=FOLDER keeps pictures of the report there.
"""

import csv
import io
import os
import struct
from pathlib import Path

import pytest
from chromium import Chromium, find
from report_cases import CURVES, HOSTILE, NUMBERS, REPORT, RUNS

from experiments.plots.report import render

pytestmark = pytest.mark.browser
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 740, "phone": True}
CURVE = "#plot-loss_tokens"
VIEW = f"{CURVE} .view"
WHOLE = "0 0 360 180"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = find()
    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(render(*REPORT), encoding="utf-8")
    browser = Chromium(program, folder)
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def page(chromium):
    """The report, freshly opened on a desktop; whatever the test does to it must leave the console empty."""
    chromium.screen(**DESKTOP)
    chromium.open(chromium.folder / "report.html")
    yield chromium
    assert chromium.console == []
    assert chromium.requests == [(chromium.folder / "report.html").as_uri()]


def on_phone(page):
    page.screen(**PHONE)
    page.open(page.folder / "report.html")


def box(page, selector=VIEW):
    """The viewBox of a plot: x, y, width, height."""
    text = page.run(f"document.querySelector('{selector} svg').getAttribute('viewBox')")
    return WHOLE if text == WHOLE else tuple(map(float, text.split()))


def size(page, selector):
    """Width and height on the screen."""
    return page.run(f"(box => [box.width, box.height])(document.querySelector('{selector}').getBoundingClientRect())")


def open_numbers(page, plot=CURVE):
    page.click(f"{plot} .numbers > summary")
    page.settle()


def cells(page, plot=CURVE):
    return page.run(
        f"Array.from(document.querySelectorAll('{plot} .numbers tbody tr'),"
        "row => Array.from(row.cells, cell => cell.textContent))"
    )


def type_filter(page, text):
    page.click(f"{CURVE} input")
    page.run(f"document.querySelector('{CURVE} input').value = ''")
    page.send("Input.insertText", text=text)


def test_it_renders_and_neither_complains_nor_asks_for_anything(page):
    assert page.run("document.title") == REPORT[0]
    for plot in (CURVE, "#plot-difference-fp8"):
        assert size(page, f"{plot} svg") == pytest.approx([720, 360], abs=1)
    assert page.run("document.querySelectorAll('svg image, svg use').length") == 4
    # A stroke that is drawn: the style sheet and the references inside the picture hold.
    assert page.run("getComputedStyle(document.querySelector('.view svg path')).strokeLinejoin") == "round"
    assert page.run("getComputedStyle(document.body).strokeLinejoin") == "miter"


def test_policy_stops_what_the_network_or_a_stray_script_could_do(chromium):
    chromium.open(chromium.folder / "report.html")
    markup = "<img src=http://127.0.0.1:9/a.png><p id=stray onclick=document.title=1>"
    chromium.run(f"document.body.insertAdjacentHTML('beforeend', '{markup}')")
    chromium.run("document.querySelector('#stray').click()")
    chromium.settle()
    assert chromium.run("document.title") == REPORT[0]
    assert len([said for said in chromium.console if "Content Security Policy" in said]) == 2


def test_buttons_zoom_and_reset(page):
    page.click(f"{CURVE} [data-do=in]")
    assert box(page) == (60, 30, 240, 120)
    assert page.run(f"document.querySelector('{CURVE} output').textContent") == "150 %"
    page.click(f"{CURVE} [data-do=in]")
    page.click(f"{CURVE} [data-do=out]")
    assert box(page) == (60, 30, 240, 120)
    assert box(page, "#plot-difference-fp8 .view") == WHOLE
    page.click(f"{CURVE} [data-do=reset]")
    assert box(page) == WHOLE
    for button in 5 * ["in"] + 5 * ["out"]:
        page.click(f"{CURVE} [data-do={button}]")
    assert box(page) == WHOLE


def test_keys_zoom_and_pan_without_a_mouse(page):
    page.run(f"document.querySelector('{VIEW}').focus()")
    page.key("+")
    page.key("ArrowRight")
    page.key("ArrowUp")
    assert box(page) == (84, 6, 240, 120)
    page.key("0")
    assert box(page) == WHOLE
    page.key("Tab")
    assert page.run("document.activeElement.dataset.do") == "out"
    page.key("Tab")
    page.key("Enter")
    assert box(page) == (60, 30, 240, 120)
    page.key("-")  # of a button, not of the plot
    assert box(page) == (60, 30, 240, 120)


def test_wheel_scrolls_the_page_and_zooms_with_control(page):
    x, y = page.middle(VIEW)
    before = page.run("scrollY")
    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=120)
    page.until(f"scrollY === {before} + 120")
    assert box(page) == WHOLE
    x, y = page.middle(VIEW)
    before = page.run("scrollY")
    page.mouse("mouseWheel", x - 180, y, deltaX=0, deltaY=-120, modifiers=2)
    left, top, width, height = box(page)
    # What the pointer is on, a quarter from the left, stays there.
    assert left == pytest.approx((360 - width) / 4, abs=0.5) and top == pytest.approx((180 - height) / 2, abs=0.5)
    assert width == pytest.approx(2 * height) and 180 < width < 300
    assert page.run("scrollY") == before
    page.wheel(VIEW, 1000, control=True)
    assert box(page) == WHOLE


def test_drag_pans_what_is_zoomed_and_stops_at_the_edge(page):
    page.drag(VIEW, 100, 0)
    assert box(page) == WHOLE
    page.click(VIEW, times=2)
    left, top, width, _ = box(page)
    assert width == 120 and left == pytest.approx(120, abs=0.5)
    page.drag(VIEW, 72, -36)
    moved = box(page)
    assert moved[0] == pytest.approx(left - 12, abs=0.1) and moved[1] == pytest.approx(top + 6, abs=0.1)
    page.drag(VIEW, 600, 0)
    page.drag(VIEW, 600, 0)
    assert box(page)[0] == 0
    page.click(VIEW, times=2)
    assert box(page) == WHOLE


def test_one_finger_scrolls_the_page_over_a_whole_plot(page):
    on_phone(page)
    x, y = page.middle(VIEW)
    before = page.run("scrollY")
    page.touch("touchStart", (x, y))
    for step in range(1, 6):
        page.touch("touchMove", (x, y - 20 * step))
    page.touch("touchEnd")
    page.until(f"scrollY > {before}")
    assert box(page) == WHOLE


def test_two_fingers_zoom_and_one_then_pans(page):
    on_phone(page)
    # Some browsers would otherwise scroll with two fingers; not this one.
    page.run("prevented = []; addEventListener('touchstart', event => { prevented.push(event.defaultPrevented); })")
    x, y = page.middle(VIEW)
    before = page.run("scrollY")
    page.touch("touchStart", (x - 30, y))
    page.touch("touchStart", (x - 30, y), (x + 30, y))
    assert page.run("prevented") == [False, True]
    for step in range(1, 6):  # apart, and up together, which for one would be scrolling
        page.touch("touchMove", (x - 30 - 6 * step, y - 12 * step), (x + 30 + 6 * step, y - 12 * step))
    page.touch("touchEnd")
    left, _, width, _ = box(page)
    assert width == pytest.approx(180, rel=0.1) and left == pytest.approx(90, rel=0.1)

    x, y = page.middle(VIEW)
    page.touch("touchStart", (x, y))
    for step in range(1, 6):
        page.touch("touchMove", (x + 8 * step, y - 20 * step))
    page.touch("touchEnd")
    page.settle()
    assert box(page)[0] == pytest.approx(left - 40 * width / size(page, VIEW)[0], abs=1)
    # Neither was the page scrolled nor zoomed in the picture's stead.
    assert page.run("[scrollY, visualViewport.scale]") == [before, 1]


def test_enlarged_plot_fills_the_screen_and_returns(page):
    before = size(page, VIEW)
    page.click(f"{CURVE} [data-do=enlarge]")
    width, height = size(page, "dialog[open] .view")
    assert width > 1200 and 700 < height < 800
    page.wheel("dialog .view", -60)  # there is no page to scroll
    assert box(page, "dialog") != WHOLE
    page.key("Escape")
    page.settle()
    assert page.run("document.activeElement.textContent") == "Enlarge"
    assert size(page, VIEW) == before and box(page) == WHOLE
    page.click(f"{CURVE} [data-do=enlarge]")
    page.click("dialog [data-do=enlarge]")
    page.settle()
    assert not page.run("document.querySelector('dialog').open") and size(page, VIEW) == before


def test_enlarged_plot_is_not_shrunk_to_a_phone_and_zooms_where_it_is_looked_at(page):
    on_phone(page)
    page.click(f"{CURVE} [data-do=enlarge]")
    page.settle()
    assert size(page, "dialog svg")[0] == 480  # as on paper
    page.run("document.querySelector('dialog .view').scrollLeft = 1000")
    page.click("dialog [data-do=in]")
    left, _, width, _ = box(page, "dialog")
    visible = size(page, "dialog .view")[0] * 360 / 480
    assert width == pytest.approx(visible / 1.5, abs=0.5)
    assert left + width / 2 == pytest.approx(360 - visible / 2, abs=1)


def test_numbers_are_made_when_asked_for_and_name_their_runs(page):
    assert cells(page) == []
    open_numbers(page)
    rows = cells(page)
    assert len(rows) == 100 < len(NUMBERS)
    assert rows[0] == ["bf16", "bf16-seed0", "1000", "3"]
    assert rows[11] == ["bf16", "bf16-seed1", "900", "3.13333"]
    exact = f"document.querySelector('{CURVE} tbody tr:nth-child(12) [title]').title"
    assert float(page.run(exact)) == NUMBERS[11]["loss"]
    page.click(f"{CURVE} .numbers > button")
    assert len(cells(page)) == 160
    assert page.run(f"document.querySelector('{CURVE} .numbers > button').hidden")


def test_several_runs_of_a_number_are_disclosed(page):
    plot = "#plot-difference-fp8"
    open_numbers(page, plot)
    hostile, fp8, int8 = cells(page, plot)
    assert hostile[0] == HOSTILE and hostile[2] == "0.5"
    assert fp8[1] == "16 runs" + "".join(RUNS)
    assert int8[1:] == ["int8-seed0", "–"]
    page.click(f"{plot} tbody tr:nth-child(2) summary")
    assert page.run(f"document.querySelector('{plot} tbody tr:nth-child(2) li').checkVisibility()")


def test_numbers_are_sorted_and_filtered(page):
    open_numbers(page)
    heading = f"{CURVE} .numbers th:nth-child(4)"
    order = lambda: page.run(f"document.querySelector('{heading}').ariaSort")
    losses = lambda: [float(row[3]) for row in cells(page)]
    page.click(f"{heading} button")
    assert order() == "ascending" and losses() == sorted(losses()) and losses()[0] == 3
    page.click(f"{heading} button")
    assert order() == "descending" and losses() == sorted(losses(), reverse=True) and losses()[0] == 3.96667
    type_filter(page, "SEED5 fp8")
    assert {row[1] for row in cells(page)} == {"fp8-seed5"} and len(cells(page)) == 10
    assert losses() == sorted(losses(), reverse=True)
    assert page.run(f"document.querySelector('{CURVE} [role=status]').textContent") == "10 of 160 rows, 10 shown"
    page.click(f"{heading} button")
    assert order() == "none" and [row[2] for row in cells(page)] == [str(step) for step in range(1000, 0, -100)]
    type_filter(page, "nothing like it")
    assert cells(page) == []


@pytest.mark.parametrize("plot", [CURVE, "#plot-difference-fp8"])
def test_csv_holds_every_digit_of_the_rows_that_are_chosen(page, plot, tmp_path):
    page.downloads(tmp_path)
    open_numbers(page, plot)
    if plot == CURVE:
        type_filter(page, "fp8-seed3")
    page.click(f"{plot} .controls button")
    page.wait_for("Browser.downloadProgress completed")
    [file] = tmp_path.iterdir()
    rows = list(csv.DictReader(io.StringIO(file.read_text(), newline="")))
    if plot == CURVE:
        assert file.name == f"{CURVES.name}.csv"
        expected = [row for row in NUMBERS if row["run"] == "fp8-seed3"]
        assert [{**row, "step": int(row["step"]), "loss": float(row["loss"])} for row in rows] == expected
    else:
        assert rows[0] == {"arm": HOSTILE, "runs": " ".join((HOSTILE, *RUNS)), "mean": "0.5"}
        assert rows[2] == {"arm": "int8", "runs": "int8-seed0", "mean": ""}


def test_run_of_a_row_leads_to_its_provenance(page):
    page.click("#table-headline details summary")
    page.click("#table-headline li:nth-child(3) a")
    assert page.run("document.querySelector(':target th').textContent") == RUNS[2]
    assert page.run("document.querySelector(':target').checkVisibility()")


def test_page_never_scrolls_sideways_on_a_phone(page):
    on_phone(page)
    assert not page.run("document.querySelector('nav details').open")
    wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.run(wide)
    open_numbers(page)
    page.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    page.settle()
    page.click(f"{CURVE} [data-do=in]")
    assert not page.run(wide)
    assert page.run("document.querySelector('#table-headline .scroll').scrollWidth > innerWidth")
    widths = page.run("Array.from(document.querySelectorAll('tbody th'), cell => cell.offsetWidth)")
    assert min(widths) > 40 and max(widths) < 180  # not broken letter by letter, and not all that there is room for
    small = page.run("Array.from(document.querySelectorAll('.tools button'), b => b.offsetHeight).filter(h => h < 40)")
    assert small == []


CONTRAST = """(() => {
    const light = color => {
        const [r, g, b] = color.match(/[\\d.]+/g).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const ground = element => {
        for (let at = element; at; at = at.parentElement) {
            const { backgroundColor } = getComputedStyle(at);
            if (!/, 0\\)$/.test(backgroundColor)) return backgroundColor;
        }
    };
    const texts = "h1, h2, h3, p, a, li, th, td, td summary, dt, dd, output, button, figcaption, input";
    return Array.from(document.querySelectorAll(texts), element => {
        const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
        return [Math.max(a, b) / Math.min(a, b), element.outerHTML.slice(0, 80)];
    }).sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_legible_and_plots_stay_on_white(page, scheme):
    page.screen(**DESKTOP, scheme=scheme)
    open_numbers(page)
    ground = lambda selector: page.run(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")
    shade = sum(map(int, ground("html").removeprefix("rgb(").removesuffix(")").split(", "))) / 3
    assert shade < 40 if scheme == "dark" else shade > 240
    assert ground(".frame") == "rgb(255, 255, 255)"
    least, where = page.run(CONTRAST)
    assert least >= 4.5, where


def test_paper_shows_the_runs_and_no_controls(page):
    page.screen(**DESKTOP, scheme="dark", media="print")
    assert page.run(CONTRAST)[0] >= 4.5  # paper is white
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.querySelector('#table-headline li').checkVisibility()")
    hidden = "Array.from(document.querySelectorAll('nav, .tools, .numbers'), e => e.checkVisibility())"
    assert not any(page.run(hidden))
    page.run("dispatchEvent(new Event('afterprint'))")
    assert not page.run("document.querySelector('#table-headline li').checkVisibility()")


def test_pictures_buttons_and_tables_have_names(page):
    open_numbers(page)
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    value = lambda node, what: node.get(what, {}).get("value", "")
    found = {}
    for node in nodes:
        found.setdefault(value(node, "role"), []).append((value(node, "name"), value(node, "description")))
    assert (CURVES.title, CURVES.caption) in found["image"]
    assert any(name.startswith(f"{CURVES.title}: plus") for name, _ in found["group"])
    for role in ("button", "region", "searchbox", "navigation", "image"):
        assert found[role] and all(name for name, _ in found[role]), role


@pytest.mark.parametrize(
    ("name", "screen", "size"),
    [
        ("desktop", DESKTOP, (1280, 800)),
        ("dark", {**DESKTOP, "scheme": "dark"}, (1280, 800)),
        ("phone", PHONE, (720, 1480)),  # two pixels for one
    ],
)
def test_picture_of_the_report(page, name, screen, size, tmp_path):
    page.screen(**screen)
    page.open(page.folder / "report.html")
    folder = Path(os.environ.get("Q8JAX_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    content = page.picture()
    (folder / f"report-{name}.png").write_bytes(content)
    assert struct.unpack(">2I", content[16:24]) == size
