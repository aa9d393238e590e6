"""The HTML report: what it holds, that it is whole without a network, and that no text becomes markup."""

import base64
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
from matplotlib.figure import Figure
from report_cases import HOSTILE, MEANS, MISSING, NUMBERS, PROVENANCE, REPORT, RUNS, SVG, TABLE

from experiments.plots.inline import inline
from experiments.plots.plot import Plot
from experiments.plots.report import render

PAGE = render(*REPORT)


class Elements(HTMLParser):
    """Elements of a page with their attributes and the text directly in them."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag]


def columns(page: str) -> list[list[dict]]:
    """What the script reads, for every plot with numbers."""
    found = Elements(page)
    kinds = found.named("script")
    texts = found.text("script")
    return [json.loads(text) for kind, text in zip(kinds, texts, strict=True) if kind.get("type") == "application/json"]


def rows(data: list[dict]) -> list[dict]:
    values = [c["values"] if "values" in c else [c["levels"][code] for code in c["codes"]] for c in data]
    names = [column["name"] for column in data]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def test_same_input_gives_the_same_text():
    assert render(*REPORT) == PAGE


def test_every_reference_in_the_page_has_its_one_target():
    elements = Elements(PAGE).elements
    ids = Counter(attributes["id"] for _, attributes in elements if "id" in attributes)
    assert set(ids.values()) == {1}
    used = set()
    for _, attributes in elements:
        for name, value in attributes.items():
            used |= set(re.findall(r"url\(#(.*?)\)", value or ""))
            used |= {value[1:]} if name == "href" and value.startswith("#") else set()
            used |= set(value.split()) if name in ("aria-labelledby", "aria-describedby") else set()
    assert used <= set(ids)
    for plot in ("loss_tokens", "difference-fp8"):
        assert {f"plot-{plot}-svg-{name}" for name in ("tick", "box", "hatch")} <= used


def test_nothing_comes_from_elsewhere_and_the_policy_says_so():
    elements = Elements(PAGE)
    policy = next(meta["content"] for meta in elements.named("meta") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    script = re.search(r"<script>(.*?)</script>", PAGE, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert rules["script-src"] == f"'sha256-{digest}'"
    for _, attributes in elements.elements:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not re.search(r"@import|url\((?!#)", PAGE)


def test_hostile_text_is_shown_and_never_markup():
    elements = Elements(PAGE)
    assert len(elements.named("script")) == 3  # two plots' numbers and the page's own
    assert not {"b", "img"} & {tag for tag, _ in elements.elements}
    assert "alert(" not in elements.text("script")[-1]
    shown = "".join(elements.texts)
    for text in (MEANS.title, MEANS.caption, TABLE.caption, MISSING[0], PROVENANCE["command"]):
        assert text in shown
    assert elements.text("li").count(HOSTILE) == 0 < elements.text("a").count(HOSTILE)
    assert rows(columns(PAGE)[1])[0] == MEANS.numbers[0]


def test_headings_descend_one_by_one():
    levels = [int(tag[1]) for tag, _ in Elements(PAGE).elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_contents_lead_to_every_part():
    links = [a["href"] for a in Elements(PAGE.partition("<nav")[2].partition("</nav>")[0]).named("a")]
    plots = ["#plots", "#plot-loss_tokens", "#plot-difference-fp8"]
    assert links == ["#missing", "#tables", "#table-headline", *plots, "#provenance"]


def test_what_there_is_none_of_is_left_out():
    page = render("Empty", [], [], {}, [])
    assert [a["href"] for a in Elements(page).named("a")] == ["#main", "#provenance"]
    assert 'id="missing"' in PAGE and 'id="missing"' not in page
    bare = render("Bare", [Plot("bare", "Bare", "Nothing.", (), (), SVG)], [], {}, [])
    assert 'class="numbers"' not in bare


def test_every_row_of_a_table_names_its_runs_and_leads_to_them():
    table = PAGE.partition('id="table-headline"')[2].partition("</article>")[0]
    first, second = (row for row in table.split("<tr>")[2:])
    assert Elements(first).text("a") == list(RUNS)
    assert Elements(second).text("a") == [HOSTILE]
    target = Elements(first).named("a")[-1]["href"][1:]
    assert Elements(PAGE.partition(f'<tr id="{target}">')[2]).text("th")[0] == RUNS[-1]


def test_table_shows_six_digits_and_keeps_the_rest():
    assert '<span title="0.0123456789">0.0123457</span>' in PAGE
    assert "inf" not in re.sub(r"<script.*?</script>", "", PAGE, flags=re.DOTALL).lower().split()


def test_numbers_stand_to_the_right_and_long_texts_in_lines():
    table = PAGE.partition('id="table-headline"')[2].partition("</article>")[0]
    heads = [head.get("class") for head in Elements(table).named("th")][:6]
    assert heads == ["prose", None, "number", "number", "number", "prose"]  # precision, runs, delta, interval, ...


def test_numbers_come_back_exactly():
    curves, means = columns(PAGE)
    assert rows(curves) == list(NUMBERS)
    assert [row["mean"] for row in rows(means)] == [0.5, None, None]
    assert [row["runs"] for row in rows(means)][2] == ["int8-seed0"]


def test_numbers_of_numpy_and_rows_of_different_keys():
    numbers = ({"x": np.float32(0.1), "n": np.int64(3)}, {"x": np.float64("nan"), "bins": (np.int32(1), 2), "ok": True})
    page = render("NumPy", [Plot("n", "N", "", (), numbers, SVG)], [], {"seeds": np.int64(8)}, [])
    assert rows(columns(page)[0]) == [
        {"x": float(np.float32(0.1)), "n": 3, "bins": None, "ok": None},
        {"x": None, "n": None, "bins": [1, 2], "ok": True},
    ]


def test_repeated_text_is_stored_once():
    run = next(column for column in columns(PAGE)[0] if column["name"] == "run")
    assert run["levels"] == list(RUNS) and len(run["codes"]) == len(NUMBERS)


def test_inlined_picture_owns_its_ids_references_and_style():
    text, width, height = inline(SVG, "p", {"role": "img"})
    root = ElementTree.fromstring(text)
    assert (width, height) == (480, 240)
    assert root.attrib == {"id": "p", "viewBox": "0 0 360 180", "role": "img"}
    assert {e.get("id") for e in root.iter()} == {None, "p", "p-tick", "p-box", "p-hatch"}
    assert root.find(".//use").get("href") == "#p-tick"
    assert "url(#p-box)" in text and "fill: url(#p-hatch)" in text
    assert root.find(".//style").text == "#p *{stroke-linejoin: round; stroke-linecap: butt}"
    assert not re.search(r"\s", root.find(".//image").get("href"))
    assert "".join(root.find(".//text").itertext()) == "steps < 100 and more"
    assert "RDF" not in text and "2026" not in text and "http" not in text


def test_inlined_picture_of_matplotlib_keeps_every_shape():
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.fill_between([0, 1], [0, 1], [2, 3], hatch="//", label="band")
    axes.imshow(np.eye(3))
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    text, width, height = inline(file.getvalue(), "p", {})
    assert (width, height) == (288, 192)
    drawn = Counter(e.tag.rpartition("}")[2] for e in ElementTree.fromstring(file.getvalue()).iter())
    kept = Counter(e.tag for e in ElementTree.fromstring(text).iter())
    assert all(kept[tag] == drawn[tag] > 0 for tag in ("path", "use", "image", "clipPath", "pattern", "g"))
    assert len(text) < len(file.getvalue())
    assert "http" not in text
