"""Sums of 8-bit products: exact in INT8, as good as float32's in FP8; and what measures them sees worse ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import accumulation
from q8jax import dot_general


@pytest.mark.parametrize("name", accumulation.PRODUCTS)
def test_sums_on_a_cpu_are_those_of_float32(name):
    found = accumulation.errors(name, 4096, rows=16, seed=0)
    assert found["fast"] == found["accurate"]
    if name.startswith("INT8"):
        assert found["fast"] == 0
    else:
        assert 2**-30 < found["fast"] < 2**-24 * np.sqrt(4096)


def test_a_narrower_sum_is_seen(monkeypatch):
    narrowed = lambda *args: dot_general(*args).astype(jnp.bfloat16).astype(jnp.float32)
    monkeypatch.setattr(accumulation, "dot_general", narrowed)
    assert 2**-11 < accumulation.errors("E4M3 × E4M3", 256, rows=16, seed=0)["fast"] < 2**-8


def test_the_table_names_what_differs(monkeypatch):
    monkeypatch.setattr(
        accumulation, "errors", lambda name, *_: {"fast": 0.25, "accurate": 0.25 * name.startswith("I")}
    )
    lines = accumulation.table([64, 128], rows=4, seed=0).splitlines()
    assert lines[0] == "| relative error | K = 64 | K = 128 |"
    assert lines[2] == "| E4M3 × E4M3, fast | 2.5e-01 | 2.5e-01 |"
    assert lines[3] == "| E4M3 × E4M3, accurate | 0.0e+00 | 0.0e+00 |"
    assert lines[-1] == "| INT8 × INT8, fast and accurate alike | 2.5e-01 | 2.5e-01 |"
