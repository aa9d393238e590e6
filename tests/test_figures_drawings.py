"""What is in each figure: numbers, labels, colours, and what is said where something is missing."""

import dataclasses
import json

import numpy as np
import pytest
import synthetic_study
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from experiments.loading import read_run
from experiments.plots import (
    amax,
    binades,
    curves,
    difference,
    heat,
    quality,
    roofline,
    saving,
    scalars,
    sensitivity,
    telemetry,
)
from experiments.plots.bands import band, limits, on_thinning, thinned
from experiments.plots.drawing import slug, style
from experiments.plots.heat import STATISTICS
from experiments.plots.latex import latex
from experiments.plots.panels import MOST_TOGETHER, Curve
from experiments.plots.plot import Table
from experiments.plots.study import Arm, load
from experiments.plots.style import LOOKS, VENUES, looks, seconds_scale, tokens_scale
from experiments.plots.tables import tables

ICML = VENUES["icml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synthetic_study.write(tmp_path_factory.mktemp("a") / "study")


@pytest.fixture(scope="module")
def study(folder):
    return load(str(folder))


@pytest.fixture(scope="module")
def seen(study):
    return telemetry.gather_arms(study)


def drawn(items):
    """Figures by name, and sentences."""
    with style(ICML):
        found = list(items)
    return {item.name: item for item in found if not isinstance(item, str)}, [i for i in found if isinstance(i, str)]


def test_band_is_students_interval():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    mean, low, high = band(values)
    # Standard deviation 1.5275 over the root of 3, times 4.3027.
    np.testing.assert_allclose(mean, [7 / 3, 5])
    np.testing.assert_allclose(high - mean, [3.7946, 0], atol=1e-4)
    np.testing.assert_allclose(mean - low, high - mean)
    assert np.isnan(band(values[:1])[1:]).all()


def test_thinning_keeps_extremes():
    values = np.sin(np.arange(100_000) / 500)
    values[[12_345, 67_890]] = 9, -9
    kept = thinned(values)
    assert len(kept) <= 2002 and {0, 12_345, 67_890, 99_999} <= set(kept.tolist()) and np.all(np.diff(kept) > 0)
    assert thinned(values[:50]).tolist() == list(range(50))


def test_curves_of_fewer_points_than_there_are_say_so(study):
    runs = list(study.arms[0].runs.values())
    few, many = (
        Curve.through("bf16", "", LOOKS["bf16"], runs, np.arange(count), np.ones((1, count))) for count in (2000, 2001)
    )
    assert "drawn" not in few.numbers("x", "y")[0] and not on_thinning(few.of)
    [told] = {row["drawn"] for row in many.numbers("x", "y")}
    assert told == "of 2001 points the least and the largest of each stretch of equal length"
    assert on_thinning(many.of).startswith(" Of the 2,001 points of a curve, the least and the largest")


def test_a_study_of_many_arms_has_tensors_of_a_few_and_of_those_that_are_named(seen):
    plain = dataclasses.replace(seen[0][1], formats={})
    named = lambda name, found: (dataclasses.replace(seen[0][0], name=name), found)
    many = [named("bf16", plain), *(named(f"fp8-{i}", seen[0][1]) for i in range(9))]
    found, [told] = telemetry.chosen(many, [])
    assert [arm.name for arm, _ in found] == [f"fp8-{i}" for i in range(8)]
    assert told == "Tensors are drawn of 8 arms: name others by --tensors_of, of bf16, fp8-8."
    assert telemetry.chosen(many[:8], []) == (many[:8], [])
    assert telemetry.chosen(many, ["fp8-8", "bf16"]) == ([many[0], many[9]], [])
    with pytest.raises(telemetry.ArmError, match=r"--tensors_of=fp9 has no telemetry: choose of bf16, fp8-0, "):
        telemetry.chosen(many, ["fp9"])


@pytest.mark.slow
def test_drawings_are_the_same_files_whichever_process_saves_them(study, monkeypatch):
    monkeypatch.setattr(saving, "_FEW", 2)
    with style(ICML):
        _, files = next(curves.draw(study, ICML)).saved()
        items = ["a sentence", next(curves.draw(study, ICML)), "another"]
        first, (plot, theirs), last = saving.saved(items, ICML)
    assert (first, last) == ("a sentence", "another")
    assert theirs == files and plot.svg == files["svg"] and plot.name == "loss_tokens"


def test_limits_show_all_means_and_of_wide_bands_a_part():
    assert limits([1, 2], [0.9, 2.1]) == pytest.approx((0.84, 2.16))
    low, high = limits([1, 2], [-100, 100])
    assert -1 < low < 0 and 3 < high < 4
    assert limits([3], []) == pytest.approx((2.95, 3.05))


def test_precisions_look_alike_everywhere_and_apart_in_colour_and_in_grey():
    assert looks(["int8", "fp8"])["fp8"] == looks(["fp8", "bf16", "fp8/margin=1"])["fp8"] == LOOKS["fp8"]
    names = [*LOOKS, *(f"fp8_history={h}_margin={m}" for h in (1, 16, 64) for m in (0, 1, 2))]
    found = [looks(names)[name] for name in names]
    assert len({(str(look["linestyle"]), look["marker"], look["color"]) for look in found}) == len(names)
    four = [LOOKS[name] for name in ("fp32", "bf16", "fp8", "int8")]
    assert len({str(look["linestyle"]) for look in four}) == len({look["marker"] for look in four}) == 4
    luminance = sorted(np.dot(to_rgb(look["color"]), (0.2126, 0.7152, 0.0722)) for look in four)
    assert min(np.diff(luminance)) > 0.03


def test_units_suit_the_size():
    assert tokens_scale(1.2e6) == (1e6, "tokens (millions)") and tokens_scale(500) == (1.0, "tokens")
    assert seconds_scale(170) == (60.0, "training time (minutes)") and seconds_scale(100)[0] == 1


def of_all(study, seen):
    yield from quality.draw(study, ICML)
    yield from curves.draw(study, ICML)
    yield from difference.draw(study, ICML)
    yield from scalars.draw(study, ICML)
    yield from telemetry.draw(seen, ICML)


@pytest.mark.slow
def test_every_axis_has_a_title_and_units_in_letters_that_can_be_read(study, seen):
    figures, _ = drawn(of_all(study, seen))
    assert len(figures) == 7 + 2 * (len(STATISTICS) + 2)
    for name, item in figures.items():
        figure = item.figure
        with style(ICML):
            figure.get_layout_engine().execute(figure)
        panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
        assert round(figure.get_figwidth(), 2) in (ICML.column, ICML.page) and figure.get_figheight() < 9
        assert {axes.get_xlabel() for axes in panels} - {""} and {axes.get_ylabel() for axes in figure.axes} - {""}, (
            name
        )
        assert any(axes.get_title(loc) for axes in panels for loc in ("left", "center")), name
        renderer = FigureCanvasAgg(figure).get_renderer()
        texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")) if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 6.6, name
        for legend in figure.legends:
            box = legend.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, name
            assert not any(box.overlaps(axes.get_window_extent(renderer)) for axes in panels), name
        assert item.caption.endswith(".") and item.numbers
        assert all(number.get("run") or number.get("runs") for number in item.numbers)


def test_a_diverged_run_is_drawn_and_counted(study):
    figures, _ = drawn(curves.draw(study, ICML))
    item = figures["loss_tokens"]
    assert "1 of 4 of fp8-unscaled" in item.caption
    rows = [row for row in item.numbers if row["runs"] == [synthetic_study.DIVERGED]]
    assert [row["tokens"] for row in rows] == [50 * 4096, 100 * 4096]
    [means] = {tuple(row["runs"]) for row in item.numbers if row["arm"] == "fp8-unscaled" and len(row["runs"]) > 1}
    assert means == ("fp8-unscaled-seed0", "fp8-unscaled-seed1", "fp8-unscaled-seed3")


def test_time_is_that_of_the_steps(study):
    figures, missing = drawn(curves.draw(study, ICML))
    rows = [row for row in figures["loss_time"].numbers if row["arm"] == "int8"]
    elapsed = [np.sum(40960 / run.metrics["tokens_per_second"]) for run in study.arms[3].runs.values()]
    assert rows[-1]["seconds"] == pytest.approx(np.mean(elapsed)) and not missing


def test_difference_is_paired(study, folder):
    figures, _ = drawn(difference.draw(study, ICML))
    last = [row for row in figures["difference_tokens"].numbers if row["arm"] == "fp8"][-1]
    read = lambda arm, seed: read_run(folder / "runs" / f"{arm}-seed{seed}").metrics["eval_loss"][-1]
    percent = [100 * (read("fp8", seed) / read("bf16", seed) - 1) for seed in range(4)]
    assert last["difference_percent"] == pytest.approx(np.mean(percent))
    assert last["high"] - last["low"] == pytest.approx(2 * 3.182446 * np.std(percent, ddof=1) / 2)
    # From seed to seed the loss itself differs by far more.
    assert 10 * np.std(percent) < 100 * np.std([read("bf16", seed) for seed in range(4)]) / read("bf16", 0)


def test_final_difference_has_every_seed_and_the_verdict(study):
    figures, _ = drawn(quality.draw(study, ICML))
    item = figures["difference_final"]
    rows = [row for row in item.numbers if row["arm"] == "fp8"]
    assert [row.get("seed") for row in rows] == [None, 0, 1, 2, 3]
    assert rows[0]["delta_percent"] == pytest.approx(np.mean([row["delta_percent"] for row in rows[1:]]))
    assert rows[0]["upper95"] == rows[0]["ci90_high"] < rows[0]["ci95_high"]
    texts = {text.get_text() for axes in item.figure.axes for text in axes.texts}
    assert {"strict +0.1 %", "parity +0.25 %", "parity (4 pairs)", "worse (3 pairs, 1 diverged)"} <= texts


def test_speed_that_does_not_count_is_left_out(folder, tmp_path):
    copy = synthetic_study.write(tmp_path / "study", telemetry=(), seeds=(0, 1))
    lines = [json.loads(line) for line in (copy / "attempts.jsonl").read_text().splitlines()]
    (copy / "attempts.jsonl").write_text("".join(json.dumps(line | {"jobs": 2}) + "\n" for line in lines))
    found = load(str(copy))
    figures, missing = drawn([*curves.draw(found, ICML), *quality.draw(found, ICML)])
    assert "loss_time" not in figures and "speed_quality" not in figures and "loss_tokens" in figures
    assert any(sentence.startswith("Speed against quality is not drawn of fp32, fp8, int8: ") for sentence in missing)
    assert any(sentence.startswith("Loss against time is not drawn of bf16, fp32") for sentence in missing)
    _, costs = tables(found, [])
    assert {row[1] for row in costs.rows} == {"–"} and "bf16, fp32, fp8, int8" in costs.caption


def test_one_seed_is_drawn_without_a_band(tmp_path):
    found = load(str(synthetic_study.write(tmp_path / "s", arms=("bf16", "int8"), seeds=(7,), telemetry=())))
    figures, _ = drawn([*curves.draw(found, ICML), *difference.draw(found, ICML), *quality.draw(found, ICML)])
    assert all(np.isnan(row["low"]) for row in figures["difference_tokens"].numbers)
    assert not [item for axes in figures["loss_tokens"].figure.axes for item in axes.collections]
    results, _ = tables(found, [])
    assert results.rows[1][3] == "–" and results.rows[1][-1] == "not enough evidence"


def test_many_precisions_have_a_panel_each(tmp_path, monkeypatch):
    names = [f"fp8_margin={m}" for m in range(MOST_TOGETHER)]
    for name in names:
        monkeypatch.setitem(synthetic_study.ARMS, name, ("candidate", {"precision": name.replace("_", "/")}))
        monkeypatch.setitem(synthetic_study._SPEEDS, name, 7000)
    found = load(str(synthetic_study.write(tmp_path / "s", arms=("bf16", "fp8", *names), seeds=(0, 1), telemetry=())))
    figures, _ = drawn([*curves.draw(found, ICML), *difference.draw(found, ICML)])
    assert len(figures["loss_tokens"].figure.axes) == 10 and len(figures["difference_tokens"].figure.axes) == 9
    assert not figures["loss_tokens"].figure.legends


def test_heat_maps_show_the_mean_of_seeds(study, seen):
    (arm, found), _ = seen
    assert arm.name == "fp8" and found.steps.tolist() == list(range(20, 301, 20)) and len(found.runs) == 4
    figures, _ = drawn(heat.draw(seen, ICML))
    assert {name.partition("_")[0] for name in figures} == {statistic.name for statistic in STATISTICS}
    read = lambda run: run.telemetry[3]["dots"]["blocks/mlp/down"]["g"]
    for name, factor in (("sqnr", 1), ("underflow", 100), ("staleness", 1)):
        at = {"layer": "blocks/mlp/down", "tensor": "g", "depth": 2, "step": 80}
        [row] = [r for r in figures[f"{name}_fp8"].numbers if at.items() <= r.items()]
        assert row[name] == pytest.approx(factor * np.mean([read(run)[name][2] for run in arm.runs.values()]))


def test_many_steps_share_a_cell_of_which_the_worst_is_shown():
    steps, cells = np.arange(1000), np.zeros((1, 1000))
    cells[0, 123] = 5
    at, binned = heat._binned(steps, cells, np.fmax)
    assert binned.shape == (1, 100) and binned[0, 12] == 5 and binned.sum() == 5 and at[12] == 120


def test_steps_without_a_layer_are_blank(tmp_path):
    """A layer that fell back to 16 bits has no telemetry from then on."""
    run = synthetic_study.write_run(tmp_path / "fp8-seed0", "fp8", 0, telemetry=True)
    lines = [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]
    for line in lines[5:]:
        del line["dots"]["blocks/mlp/up"], line["formats"]["blocks/mlp/up"]
    (run / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = telemetry.gather([read_run(run)])
    sqnr = found.mean("blocks/mlp/up", "x", "sqnr")
    assert np.isfinite(sqnr[:5]).all() and np.isnan(sqnr[5:]).all() and "blocks/mlp/up" in found.layers


def rewritten(run, change):
    """The telemetry of a run, its lines made to others."""
    lines = [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]
    (run / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def test_a_run_that_ended_early_leaves_the_steps_of_others(tmp_path):
    runs = [synthetic_study.write_run(tmp_path / f"fp8-seed{i}", "fp8", i, telemetry=True) for i in range(2)]
    rewritten(runs[1], lambda lines: lines[:2])
    found = telemetry.gather([read_run(run) for run in runs])
    assert found.steps.tolist() == list(range(20, 301, 20)) and not found.is_even
    sqnr = found.values["blocks/mlp/up", "x", "sqnr"]
    assert np.isfinite(sqnr[0]).all() and np.isfinite(sqnr[1, :2]).all() and np.isnan(sqnr[1, 2:]).all()
    arm = Arm("fp8", "candidate", "bf16", {})
    assert all(
        "the mean of 2 seeds, of those that got so far." in drawing.caption
        for drawing in heat.draw([(arm, found)], ICML)
    )


def test_formats_and_histograms_are_of_the_last_step_that_was_quantized(tmp_path):
    """As of a schedule that ends in 16 bits, and of a layer that fell back."""
    run = synthetic_study.write_run(tmp_path / "fp8-seed0", "fp8", 0, telemetry=True)

    def change(lines):
        for line in lines[10:]:
            line["formats"] = {layer: dict.fromkeys("xwg") for layer in line["formats"]}
        for line in lines[5:]:
            del line["dots"]["blocks/mlp/up"], line["formats"]["blocks/mlp/up"]
        return lines

    rewritten(run, change)
    found = telemetry.gather([read_run(run)])
    assert set(found.formats.values()) == {"float8_e4m3fn"}
    assert {layer: step for (layer, _), (step, _) in found.binades.items()}["blocks/mlp/up"] == 100
    arm = Arm("fp8", "candidate", "bf16", {})
    caption = binades.draw(arm, found, ICML).caption
    assert "in fp8-seed0 at the last step that quantized it, of 100 to 200: shares" in caption


def test_amax_comes_with_the_largest_number_of_its_scale(study, seen):
    arm, found = seen[0]
    figures, _ = drawn([amax.draw(arm, found, ICML)])
    item = figures["amax_fp8"]
    record = study.arms[2].runs[0].telemetry[0]["dots"]["blocks/attention/out"]["g"]
    at = {"layer": "blocks/attention/out", "tensor": "g", "depth": 1, "step": 20, "run": "fp8-seed0"}
    [row] = [row for row in item.numbers if at.items() <= row.items()]
    assert (row["amax"], row["scale"]) == (record["amax"][1], record["scale"][1])
    # Third row, first panel: amax and largest number by turns.
    line = item.figure.axes[8].lines[3]
    assert line.get_ydata()[0] == record["scale"][1] * 448 > record["amax"][1]


def test_histograms_are_shares_of_what_is_not_zero(study, seen):
    arm, found = seen[1]
    figures, _ = drawn([binades.draw(arm, found, ICML)])
    record = study.arms[3].runs[0].telemetry[-1]["dots"]["blocks/mlp/up"]["w"]["binades"][3]
    rows = [
        r for r in figures["binades_int8"].numbers if (r["layer"], r["tensor"], r["depth"]) == ("blocks/mlp/up", "w", 3)
    ]
    assert sum(row["percent"] for row in rows) == pytest.approx(100)
    largest = max(rows, key=lambda row: row["percent"])
    assert largest["binade"] == -24 + int(np.argmax(record))


def test_without_telemetry_it_says_so():
    figures, missing = drawn(telemetry.draw([], ICML))
    assert not figures and "--telemetry=tensors" in missing[0]


def test_sensitivity_is_ranked(folder):
    found = load(str(folder))
    assert "experiments.whatif writes" in drawn(sensitivity.draw(found, ICML))[1][0]
    path = folder / "runs" / "bf16-seed1" / "whatif.json"
    synthetic_study.write_sensitivity(path, "bf16-seed1")
    figures, _ = drawn(sensitivity.draw(found, ICML))
    path.unlink()
    item = figures["sensitivity"]
    assert [number["run"] for number in item.numbers] == ["bf16-seed1"] * 2 and "step 300 of bf16-seed1" in item.caption
    assert [text.get_text() for text in item.figure.axes[0].get_yticklabels()] == ["mlp/up, depth 3"] * 2


def test_roofline_is_that_of_the_benchmark(folder):
    found = load(str(folder))
    assert "experiments.benchmark writes" in drawn(roofline.draw(found, ICML))[1][0]
    path = folder / "benchmark.json"
    synthetic_study.write_benchmark(path)
    figures, _ = drawn(roofline.draw(found, ICML))
    synthetic_study.write_benchmark(path, roofs=None)
    assert "benchmark.json has no roofs" in drawn(roofline.draw(found, ICML))[1][0]
    path.unlink()
    bf16, fp8 = figures["roofline"].numbers
    assert (bf16["intensity"], bf16["rate"]) == (1000, 4e9) and (fp8["intensity"], fp8["rate"]) == (2000, 8e9)


def test_the_telemetry_table_is_over_everything(study, seen):
    *_, table = tables(study, seen)
    assert table.name == "telemetry" and [row[:3] for row in table.rows[:3]] == [
        ("fp8", "x", "e4m3fn"),
        ("fp8", "w", "e4m3fn"),
        ("fp8", "g", "e4m3fn"),
    ]
    values = [
        value
        for run in study.arms[2].runs.values()
        for record in run.telemetry
        for dot in record["dots"].values()
        for value in dot["g"]["sqnr"]
    ]
    assert table.rows[2][3:5] == (f"{np.median(values):.1f}", f"{min(values):.1f}")


def test_latex_escapes_text_and_sets_numbers():
    table = Table("t", "T", "C", ("a_b", "50 %"), (("x_{y}\\", "-1,234.5e-05"), ("~^&#", "–")), ((), ()))
    body = latex(table).splitlines()[2:]
    assert body == [
        r"\begin{tabular}{@{}lr@{}}",
        r"\toprule",
        r"a\_b & 50 \% \\",
        r"\midrule",
        r"x\_\{y\}\textbackslash{} & $-1{,}234.5 \times 10^{-5}$ \\",
        r"\textasciitilde{}\textasciicircum{}\&\# & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_slugs_are_names_of_files():
    assert slug("blocks/mlp/.*->fp8;.*->bf16") == "blocks-mlp-fp8-bf16"
