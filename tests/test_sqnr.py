"""The SQNR table of the literature, reproduced."""

import subprocess
import sys

import numpy as np
import pytest

from experiments import sqnr

# dB for normal, Student's t with 3 degrees of freedom, and 0.1 % outliers × 60, one draw of 2^20 values; and the
# standard deviation of a draw of the last, from 200 of them.
LITERATURE = {
    "E4M3 tensor": (31.5, 31.6, 31.7, 0.18),
    "E5M2 tensor": (25.6, 25.6, 25.6, 0.20),
    "INT8 1×128": (43.8, 37.0, 32.9, 0.05),
    "MXINT8": (41.6, 37.7, 35.4, 0.10),
    "MXFP8 scale down": (30.6, 29.4, 28.6, 0.35),
    "MXFP8 scale up": (31.5, 31.7, 32.0, 0.18),
    "E4M3 amax 2× too low": (25.1, 23.6, 15.9, 1.51),
    "E4M3 2× margin": (31.5, 31.6, 31.7, 0.18),
    "INT8 tensor": (38.9, 13.6, 13.6, 0.83),
    "INT8 row of 4096": (41.2, 26.5, 20.1, 0.10),
}
CELLS = np.array(list(LITERATURE.values()))
ROW = {name: i for i, name in enumerate(LITERATURE)}


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return sqnr.measure(tuple(LITERATURE), sqnr.DISTRIBUTIONS, draws=5, samples=2**20, seed=0)


def test_the_first_draw_is_the_published_one_but_for_where_its_outliers_lie(table):
    np.testing.assert_allclose(table[:, :2, 0], CELLS[:, :2], atol=0.1)


def test_a_draw_of_outliers_is_the_published_one():
    # One of two among the first 200 that come so near in the cells of FP8 and of tiles.
    draw = sqnr.measure(tuple(LITERATURE), ("outliers",), draws=1, samples=2**20, seed=83)
    np.testing.assert_allclose(draw[:, 0, 0], CELLS[:, 2], atol=0.3)


def test_the_published_draw_of_outliers_is_one_of_many(table):
    published, deviation = CELLS[:, 2], CELLS[:, 3]
    assert (np.abs(np.median(table[:, 2], axis=-1) - published) < 4 * deviation).all()


def test_a_scale_two_times_too_small_costs_and_two_times_too_large_does_not(table):
    exact, low, margin = (table[ROW[name], :, 0] for name in ("E4M3 tensor", "E4M3 amax 2× too low", "E4M3 2× margin"))
    np.testing.assert_allclose(margin, exact, atol=0.05)
    assert (exact - low > 5).all()
    assert (exact - low < 20).all()


def test_one_scale_for_a_tensor_leaves_heavy_tails_to_their_largest_value(table):
    spread = np.ptp(table[ROW["INT8 tensor"]], axis=-1)
    assert spread[1] > 5
    assert spread[0] < 3


def test_the_program_prints_a_table_and_refuses_bad_flags():
    def run(*flags):
        command = [sys.executable, "-m", "experiments.sqnr", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("--samples=8192", "--draws=1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(sqnr.CASTS)
    assert all(line.count("|") == 5 for line in lines)
    refused = run("--samples=8193")
    assert refused.returncode == 1
    assert "--samples=8193: use a multiple of 4096" in refused.stderr
    assert "Traceback" not in refused.stderr
