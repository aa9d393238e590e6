"""The benchmark's contenders train the same MLP, and its table says what was measured; how fast is not tested."""

import jax
import numpy as np
import pytest
from absl import flags

from experiments import benchmark
from experiments.targets import Target

OWN = ["flax fp32", "flax bf16", "q8jax fp32", "q8jax bf16", "q8jax fp8", "q8jax int8", "flax fp8"]
SHAPES = benchmark.Shapes(layers=2, width=16, hidden=32, tokens=64)


@pytest.fixture(scope="module")
def measured() -> tuple[np.ndarray, np.ndarray]:
    return benchmark.measure(OWN, SHAPES, rounds=3)


def test_every_contender_trains_the_same_network(measured):
    _, losses = measured
    assert (np.diff(losses, axis=1) < 0).all()
    np.testing.assert_allclose(losses, np.broadcast_to(losses[:1], losses.shape), rtol=0.05)


def test_the_contenders_differ_in_arithmetic_alone(measured):
    _, losses = measured
    last = dict(zip(OWN, losses[:, -1], strict=True))
    assert last["q8jax fp32"] == pytest.approx(last["flax fp32"], rel=1e-5)
    narrow = [last[name] for name in ("flax fp32", "flax bf16", "q8jax fp8", "q8jax int8")]
    assert len(set(narrow)) == len(narrow)


def test_every_round_times_every_contender(measured):
    seconds, losses = measured
    assert seconds.shape == losses.shape == (len(OWN), 3)
    assert (seconds > 0).all()


def test_ratios_are_taken_within_a_round():
    # The second round is ten times slower for all; a ratio of medians would not be 2.
    seconds = np.array([[1.0, 10.0, 1.0], [2.0, 20.0, 3.0]])
    lines = benchmark.table(["flax bf16", "q8jax fp8"], seconds, np.ones((2, 3))).splitlines()
    assert lines[2] == "| flax bf16 | 1000 | 1.00 (1.00 to 1.00) | 1.0000 |"
    assert lines[3] == "| q8jax fp8 | 3000 | 2.00 (2.00 to 2.50) | 1.0000 |"


def test_programs_are_counted_against_the_reference():
    goal = Target(tuple(jax.devices()[:2]), {})
    names = ("flax bf16", "q8jax fp8", "q8jax int8")
    reports = {name: benchmark.compiled_for(benchmark.CONTENDERS[name], SHAPES, goal) for name in names}
    assert all(sum(gemm.times for gemm in report.gemms) == 11 for report in reports.values())
    assert [{gemm.asked for gemm in report.gemms} for report in reports.values()] == [
        {("bfloat16", "bfloat16")},
        {("float8_e4m3fn",) * 2, ("float8_e5m2", "float8_e4m3fn"), ("float8_e4m3fn", "float8_e5m2")},
        {("int8", "int8")},
    ]
    lines = benchmark.table_of_programs(reports).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in cells] == list(names)
    assert cells[0][3] == "1.00" and all(float(row[4]) == reports[row[0]].costs.kernels for row in cells)
    assert all(row[6] == "" for row in cells)  # a CPU's compiler estimates no cycles


def test_a_misspelt_contender_is_refused():
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values(["benchmark"])
    with pytest.raises(flags.IllegalFlagValueError, match="choose some of flax fp32"):
        values.contenders = ["flax fp9"]
