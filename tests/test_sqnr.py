"""The SQNR table of the literature, reproduced."""

import subprocess
import sys

import numpy as np
import pytest

from experiments import sqnr

# dB for normal, Student's t with 3 degrees of freedom, and 0.1 % outliers × 60; one draw of 2^20 values.
LITERATURE = {
    "E4M3 tensor": (31.5, 31.6, 31.7),
    "E5M2 tensor": (25.6, 25.6, 25.6),
    "INT8 1×128": (43.8, 37.0, 32.9),
    "MXINT8": (41.6, 37.7, 35.4),
    "MXFP8 scale down": (30.6, 29.4, 28.6),
    "MXFP8 scale up": (31.5, 31.7, 32.0),
    "E4M3 2× margin": (31.5, 31.6, 31.7),
}
SAMPLES = 2**20


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return sqnr.measure(tuple(LITERATURE), sqnr.DISTRIBUTIONS, draws=5, samples=SAMPLES, seed=0)


def test_fp8_and_tiled_formats_on_smooth_data(table):
    wanted = np.array(list(LITERATURE.values()))[:, :2]
    np.testing.assert_allclose(table[:, :2, 0], wanted, atol=0.3)


def test_fp8_and_tiled_formats_on_outliers(table):
    # A thousand outliers carry four fifths of the signal, so a draw of E4M3 has a standard deviation
    # of 0.2 dB; the published draw of MXFP8 lies 0.4 to 0.5 above the median.
    for (name, (*_, wanted)), found in zip(LITERATURE.items(), table[:, 2], strict=True):
        assert abs(np.median(found) - wanted) < (0.7 if name.startswith("MXFP8") else 0.3), name


def test_a_scale_two_times_too_small_costs_and_two_times_too_large_does_not(table):
    low = sqnr.measure(("E4M3 amax 2× too low",), sqnr.DISTRIBUTIONS, draws=1, samples=SAMPLES, seed=0)[0, :, 0]
    names = list(LITERATURE)
    exact, margin = table[names.index("E4M3 tensor"), :, 0], table[names.index("E4M3 2× margin"), :, 0]
    np.testing.assert_allclose(margin, exact, atol=0.05)
    np.testing.assert_allclose(low[:2], (25.1, 23.6), atol=0.3)
    assert (exact - low > 5).all()
    assert (exact - low < 20).all()


def test_int8_by_tensor_and_row_as_the_median_of_twenty_draws():
    names = ("INT8 tensor", "INT8 row of 4096")
    found = sqnr.measure(names, sqnr.DISTRIBUTIONS, draws=20, samples=SAMPLES, seed=0)
    median, spread = np.median(found, axis=-1), np.ptp(found, axis=-1)
    assert (np.abs(median[0] - (38.9, 13.6, 13.6)) < (0.5, 3, 1)).all()
    assert (np.abs(median[1] - (41.2, 26.5, 20.1)) < (0.3, 1.5, 0.3)).all()
    # Why a median: one scale for the tensor leaves it to the largest of a million heavy-tailed values.
    assert spread[0, 1] > 5
    assert spread[0, 0] < 3


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
