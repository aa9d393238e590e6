"""Statistics, tables and drawings of the benchmark, on made-up times."""

import types
import xml.etree.ElementTree

import pytest

import q8jax
from experiments.benchmarks import timing
from experiments.benchmarks.contest import contest
from experiments.benchmarks.results import Measurement, Program, Results, Roofs, multiplied, pays_from, total
from experiments.benchmarks.roofline import draw, measured_roofs, roofs_of
from experiments.benchmarks.tables import markdown
from q8jax.hlo.costs import Costs
from q8jax.report import EMULATED, NATIVE, WRONG, Gemm

H100 = "NVIDIA H100 80GB HBM3"
BF16 = Program({"BF16": 3}, {"cuBLASLt bf16": 3}, NATIVE, {"BF16": 6e9}, 2 * 10**8, 5)
FP8 = Program({"FP8": 3}, {"cuBLASLt FP8": 3}, NATIVE, {"FP8": 6e9}, 10**8, 9, 7, 8, 11)


def measurement(work, bf16, fp8, **others):
    programs = {"flax bf16": BF16, "q8jax fp8": FP8}
    seconds = {"flax bf16": bf16, "q8jax fp8": fp8}
    sizes = {"tokens": 10, "inputs": 10, "outputs": 10}
    return Measurement(work, sizes, 6e9, "flax bf16", programs, seconds=seconds, **others)


def results(measurements, **others):
    environment = {
        "command": "python -m experiments.benchmark",
        "devices": {"platform": "gpu"},
        "cpu": {"model": "x", "cores": 2},
        "versions": {"jax": "0.10.2"},
    }
    return Results("gemm", H100, 3, environment, measurements, **others)


def test_ratios_are_taken_within_a_round():
    # The second round is ten times slower for all; a ratio of medians would be 3.
    found = measurement("FC1", [1.0, 10.0, 1.0], [2.0, 20.0, 3.0])
    assert str(found.ratio("q8jax fp8")) == "2.00 (2.00 to 2.50)"
    assert str(found.ratio("flax bf16")) == "1.00 (1.00 to 1.00)"
    assert str(found.ratio("flax bf16", "q8jax fp8")) == "0.50 (0.42 to 0.50)"
    both = total("all", [found, measurement("FC2", [1.0, 1.0, 3.0], [1.0, 1.0, 1.0])])
    assert both.seconds["q8jax fp8"] == [3.0, 21.0, 4.0] and both.ratio("q8jax fp8").middle == 1.5
    assert both.programs["q8jax fp8"].products == {"FP8": 6} and both.programs["flax bf16"].bytes == 4 * 10**8


def test_every_round_begins_with_another_contender(monkeypatch):
    order = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = timing.in_turns(runs, rounds=3, calls=2)
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert seconds == {name: [0.5, 0.5, 0.5] for name in "abc"}  # the first round is not counted


def test_a_contender_pays_from_the_size_on_which_it_stays_faster():
    ones = [1.0, 1.0, 1.0]
    slow, fast, uncertain = [1.2, 1.2, 1.2], [0.8, 0.8, 0.8], [0.7, 0.8, 1.4]
    sweep = lambda *times: [measurement(str(i), ones, t) for i, t in zip((256, 512, 1024), times, strict=True)]
    assert pays_from(sweep(slow, fast, fast), "q8jax fp8") == "512"
    assert pays_from(sweep(fast, fast, fast), "q8jax fp8") == "256"
    assert pays_from(sweep(fast, slow, fast), "q8jax fp8") == "1024"  # what it gained at 256 it lost again
    assert pays_from(sweep(slow, uncertain, fast), "q8jax fp8") == "1024"  # its upper quartile is above 1
    assert pays_from(sweep(fast, fast, slow), "q8jax fp8") is None
    assert pays_from(sweep(slow, fast, fast), "another") is None
    text = markdown(results([measurement("FC1", ones, fast)], sweep=sweep(fast, fast, slow)))
    assert "| q8jax fp8 | 0.80 | 0.80 | 1.20 | never, from 256 to 1024 |" in text


class Ready:
    program = BF16

    def __init__(self):
        self.losses = []

    def __call__(self):
        self.losses.append(float("nan") if len(self.losses) == 2 else 1.0)


def failing():
    raise NotImplementedError("no such unit\non this device")


def test_a_contender_that_fails_is_reported_and_the_others_go_on():
    found = contest("FC1", {}, 1.0, {"a": Ready, "b": failing, "c": Ready}, "a", rounds=2)
    assert found.failures == {"b": "NotImplementedError: no such unit"} and list(found.seconds) == ["a", "c"]
    assert found.losses == {"a": [1.0, None], "c": [1.0, None]}
    with pytest.raises(ValueError, match=r"b, which all are compared with, does not run here \(NotImplementedError"):
        contest("FC1", {}, 1.0, {"a": Ready, "b": failing}, "b", rounds=2)


@pytest.mark.parametrize(
    ("operands", "device", "kind"),
    [
        (("float8_e4m3fn", "float8_e5m2"), H100, "FP8"),
        (("int8", "bfloat16"), H100, "BF16"),
        (("float32", "float32"), "cpu", "FP32"),
        (("int8", "int8"), "TPU v6 lite", "INT8"),
        (("float8_e4m3fn", "float8_e4m3fn"), "TPU v6 lite", "BF16"),
        (("float8_e4m3fn", "float8_e4m3fn"), "cpu", "FP8"),
    ],
)
def test_what_is_multiplied_is_the_wider_operand_or_what_the_unit_makes_of_it(operands, device, kind):
    assert multiplied(Gemm("", "fwd", None, operands, "float32", "", NATIVE, (), 1, 1), device) == kind


def test_a_program_is_labelled_by_its_worst_product():
    gemm = lambda dtype, verdict, times: Gemm("", "fwd", None, (dtype,) * 2, "float32", "x", verdict, (), times, 5)
    costs = Costs(10, 3, 3, 3, 0, None, ())
    mixed = [gemm("int8", NATIVE, 7), gemm("bfloat16", EMULATED, 4)]
    label = lambda *gemms, **others: str(Program.of(q8jax.Report(H100, gemms, costs, None, **others)))
    assert label(*mixed) == "7 INT8, 4 BF16, emulated exactly"
    assert label(*mixed, gemm("bfloat16", WRONG, 1)) == "7 INT8, 5 BF16, not what was asked"
    assert label(*mixed, unmatched=("mlp",)) == "7 INT8, 4 BF16, not what was asked"


def test_results_go_to_json_and_back():
    found = results(
        [measurement("FC1", [1.0, 2.0], [0.5, 1.0], failures={"x": "y"}, losses={"flax bf16": [0.1, 0.2]})],
        sweep=[measurement("256", [1.0, 2.0], [0.5, 1.0])],
        notes=["Of something."],
        roofs=Roofs({"BF16": 1e12}, 1e9, "data sheet"),
    )
    assert Results.from_json(found.to_json()) == found
    assert markdown(Results.from_json(found.to_json())) == markdown(found)


def test_the_table_says_rate_peak_and_intensity():
    (line,) = [
        line
        for line in markdown(results([measurement("FC1", [1e-5] * 3, [5e-6] * 3)])).splitlines()
        if line.startswith("| q8jax")
    ]
    assert line == "| q8jax fp8 | 0.005 | 0.50 (0.50 to 0.50) | 0.50 | 1200 | 61% | 60 | 3 FP8, native |"


def test_roofs_are_the_data_sheets_or_measured():
    found = roofs_of(types.SimpleNamespace(device_kind=H100, platform="gpu"))
    assert found == Roofs({"BF16": 989e12, "FP8": 1979e12, "INT8": 1979e12}, 3.35e12, "data sheet")
    here = measured_roofs(128, 2**20)
    assert set(here.peaks) == {"FP32", "BF16"} and min(*here.peaks.values(), here.bandwidth) > 1e6
    assert here.source == "measured: products of 128³, and a pass over 1 MiB"


def test_the_roofline_shows_every_contender(tmp_path):
    found = results([measurement("FC1", [1e-5], [5e-6])], roofs=Roofs({"BF16": 989e12, "FP8": 1979e12}, 3e12, "x"))
    draw(found, tmp_path)
    svg = (tmp_path / "roofline.svg").read_text()
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg")
    assert all(f"<!-- {text} -->" in svg for text in ("flax bf16", "q8jax fp8", "FC1", "BF16", "FP8"))
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
