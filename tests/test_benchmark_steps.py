"""The benchmark's training steps: whose model they share, what counts as their work, and against which peak."""

import jax
import pytest
from micro import quick_compiles  # noqa: F401

import q8jax
from experiments import options, pretrain  # noqa: F401  (pretrain defines the flags)
from experiments.benchmarks.results import Measurement, Program
from experiments.benchmarks.steps import Entrant, flops_by_kind
from experiments.job import Job
from q8jax.hlo.costs import Costs
from q8jax.report import NATIVE, Gemm

STEP = ("--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--mesh=data:1")
H100 = "NVIDIA H100 80GB HBM3"
# By hand. A token passes 32×96 (QKV), 32×32, 32×64 (gate and up), 32×32 and 32×256 (head), three times in a step.
BLOCK = 32 * 96 + 32 * 32 + 32 * 64 + 32 * 32
HEAD = 32 * 256
ATTENTION = 16 * 32  # scores and values over half of 16 tokens
TOKENS = 8 * 16


def job(*arguments):
    options.parse(["benchmark", *STEP, *arguments])
    return Job.of_flags(jax.devices())


@pytest.mark.slow
def test_precisions_take_turns_at_one_model():
    shared = {}
    entrants = [Entrant(job("--precision=bf16"), shared)]
    # As a step that fails on the device leaves what it was given.
    jax.tree.map(lambda leaf: leaf.delete(), shared["params"])
    entrants.append(Entrant(job("--precision=fp8"), shared))
    for entrant in entrants:
        metrics, _, seen = entrant()
        assert metrics["sound"] and seen is None
    assert int(shared["step"]) == 2 and set(shared) == {"params", "optimizer", "step", "sound", "nonfinite"}
    params = 4 * (BLOCK + 2 * HEAD + 3 * 32)
    for entrant in entrants:
        program = entrant.program
        assert sum(program.flops.values()) == 6 * TOKENS * (BLOCK + HEAD + ATTENTION) == 12_189_696
        assert program.memory_bytes > 3 * params  # weights and two moments


def report(*gemms):
    found = [Gemm(p, r, None, (dtype, dtype), "float32", "cuBLASLt", NATIVE, (), 1, 10**9) for p, r, dtype in gemms]
    return q8jax.Report(H100, tuple(found), Costs(10**6, 1, 1, 1, 0, None, ()), None)


def test_work_is_counted_by_what_is_really_multiplied():
    up = [("blocks/mlp/up", role, "float8_e4m3fn") for role in ("fwd", "dlhs", "drhs")]
    widened = [("head", "fwd", "bfloat16")]
    found = flops_by_kind(job("--precision=fp8", "--accumulate=2"), report(*up, *widened))
    of_up = 3 * 2 * TOKENS * 32 * 64
    assert found == {"FP8": of_up, "BF16": 6 * TOKENS * (BLOCK + HEAD + ATTENTION) - of_up}


def test_recomputed_and_masked_products_are_no_work():
    whole = flops_by_kind(job("--precision=bf16"), report())
    again = [("blocks/mlp/down", "fwd", "bfloat16")] * 2
    assert flops_by_kind(job("--precision=bf16", "--remat"), report(*again)) == whole


@pytest.mark.parametrize(
    ("device", "share"),
    [(H100, (4e12 / 1979e12 + 2e12 / 989e12) / 0.01), ("TPU v5 lite", 6e12 / 197e12 / 0.01), ("cpu", None)],
)
def test_the_share_of_the_peak_is_of_the_unit_that_multiplies(device, share):
    flops = {"FP8": 4e12, "BF16": 2e12} if device == H100 else {"BF16": 6e12}
    program = Program({}, {}, NATIVE, flops, 1, 1)
    found = Measurement("x", {}, 6e12, "a", {"a": program}, seconds={"a": [0.01]}).share_of_peak("a", device)
    assert found == (share if share is None else pytest.approx(share))
