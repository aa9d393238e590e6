"""The plan's sizes, FLOPs and memory, and the peaks that utilization is measured against."""

import re

import jax
import jax.numpy as jnp
import pytest
from micro import make_trainer

from experiments.models.config import SIZES
from experiments.training.plan import describe, estimated_memory, products

ROWS, LENGTH = 8, 16


def test_products_come_to_the_flops_of_the_model():
    config = SIZES["1b"]
    flops = {path: 6 * times * m * k * n for path, (times, m, k, n) in products(config, ROWS, LENGTH).items()}
    attention = sum(count for path, count in flops.items() if path.endswith(("scores", "values")))
    # The plan shows attention's products whole, of which the causal half counts.
    assert sum(flops.values()) - attention / 2 == config.flops_per_token(LENGTH) * ROWS * LENGTH


def test_every_gemm_is_in_the_plan_with_its_recipe():
    trainer = make_trainer("blocks/mlp/down->int8-switchback;head->fp8", accumulate=2)
    lines = [re.split(" {2,}", line) for line in describe(trainer, ROWS, LENGTH).splitlines()]
    table = {(line[0], line[1]): line[2:] for line in lines if len(line) == 5}
    assert len(table) == 1 + 7 * 3
    assert [table["blocks/mlp/down", role] for role in ("fwd", "dlhs", "drhs")] == [
        ["2×", "128×64 · 64×32", "int8:row:current × int8:tensor:current"],
        ["2×", "128×32 · 32×64", "int8:row:current × int8:tensor:current"],
        ["2×", "64×128 · 128×32", "bfloat16 × bfloat16"],
    ]
    assert table["blocks/attention/scores", "fwd"] == ["64×", "16×8 · 8×16", "bfloat16 × bfloat16"]
    assert table["head", "dlhs"] == ["1×", "128×64 · 64×32", "e4m3fn:tensor:delayed × e4m3fn:tensor:delayed"]
    assert "tokens of a step      256" in describe(trainer, ROWS, LENGTH)


def test_memory_is_shared_out_by_purpose():
    memory = {
        remat: estimated_memory(make_trainer("fp8", remat=remat, layers=8), ROWS, LENGTH) for remat in (False, True)
    }
    params = make_trainer("fp8", layers=8).config.params
    for found in memory.values():
        assert 12 * params <= found["weights and moments"] < 12 * params + 20_000
        assert found["gradients"] == 4 * params
    assert memory[False]["backward of a block"] == memory[False]["kept for backward"] // 8
    # Of each block only its input is left, and what stands outside the blocks.
    inputs = 8 * ROWS * LENGTH * 32 * 2
    assert inputs <= memory[True]["kept for backward"] < memory[False]["kept for backward"] / 3


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_the_compiler_needs_what_the_plan_says_and_no_more_than_twice_that(remat):
    trainer = make_trainer("fp8", remat=remat, d_model=128, d_ff=256, vocab=256)
    state = jax.eval_shape(trainer.init)
    tokens = jax.ShapeDtypeStruct((1, 16, 129), jnp.int32)
    needed = jax.jit(trainer.step, donate_argnums=0).lower(state, tokens).compile().memory_analysis()
    size = needed.temp_size_in_bytes + needed.argument_size_in_bytes
    assert 1 < size / sum(estimated_memory(trainer, 16, 128).values()) < 2
