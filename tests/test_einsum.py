"""Einsum of two operands against jnp.einsum, its gradients, and the quantized dot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q8jax
from q8jax.einsum import as_dot

# Expressions with shapes of their operands.
CASES = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ij,jk->ki", (2, 3), (3, 4)),
    ("ij,jk", (2, 3), (3, 4)),
    ("ba,ac", (2, 3), (3, 4)),
    ("ji,jk", (3, 2), (3, 4)),
    ("Zb,ba", (2, 3), (3, 4)),
    (" i j , j k -> i k ", (2, 3), (3, 4)),
    ("btd,dhk->bthk", (2, 3, 4), (4, 2, 5)),
    ("bthk,hkd->btd", (2, 3, 2, 5), (2, 5, 4)),
    ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5)),
    ("bhqk,bkhd->bqhd", (2, 4, 3, 6), (2, 6, 4, 5)),
    ("bgqk,bkgd->dgqb", (2, 4, 3, 6), (2, 6, 4, 5)),
    ("i,i->", (4,), (4,)),
    ("i,i->i", (4,), (4,)),
    ("i,j->ij", (4,), (3,)),
    ("i,j->ji", (4,), (3,)),
    (",->", (), ()),
    ("ij,->ji", (2, 3), ()),
    (",ij", (), (2, 3)),
    ("ijk,lkj->il", (2, 3, 4), (5, 4, 3)),
    # Indices that are summed out of one operand.
    ("ijk,kl->il", (2, 3, 4), (4, 5)),
    ("ij,kl->", (2, 3), (4, 5)),
    ("ij,kl->l", (2, 3), (4, 5)),
    ("ij,jk->", (2, 3), (3, 4)),
    # Ellipses: aligned to the right, broadcast, in the middle, without axes.
    ("...ij,...jk->...ik", (5, 2, 3), (5, 3, 4)),
    ("...ij,jk->...ik", (5, 6, 2, 3), (3, 4)),
    ("ij,...jk->...ik", (2, 3), (6, 3, 4)),
    ("...ij,...jk->...ik", (5, 6, 2, 3), (6, 3, 4)),
    ("...ij,...jk->...ik", (2, 3), (3, 4)),
    ("...ij,...jk->...ik", (5, 1, 2, 3), (1, 6, 3, 4)),
    ("...ij,...jk->ik...", (1, 2, 3), (6, 3, 4)),
    ("...i,...i", (5, 3), (5, 3)),
    ("...i,...i", (1, 3), (5, 3)),
    ("...,...", (2, 3), (3,)),
    ("a...b,b...->a...", (2, 4, 5, 3), (3, 4, 5)),
    ("i...,i...", (2, 3), (2, 3)),
    ("...i,i", (2, 3), (3,)),
    ("...i,i->i", (2, 3), (3,)),
    # Axes of size 1 and 0.
    ("ij,jk->ik", (2, 1), (3, 4)),
    ("ij,jk->ik", (2, 3), (1, 4)),
    ("bij,bjk->bik", (1, 2, 3), (6, 3, 4)),
    ("ij,jk->ik", (2, 0), (0, 4)),
    ("ij,jk->ik", (0, 3), (3, 4)),
]


def test_agrees_with_jnp_and_its_gradients():
    random = np.random.default_rng(0)
    whole = lambda shape: random.integers(-3, 4, shape).astype(np.float32)
    arrays = [(whole(lhs), whole(rhs)) for _, lhs, rhs in CASES]
    jitted = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})

    @jitted
    def both(arrays):
        results = []
        for (subscripts, *_), pair in zip(CASES, arrays, strict=True):
            functions = (
                lambda a, b, s=subscripts: q8jax.einsum(s, a, b, "fp32"),
                lambda a, b, s=subscripts: jnp.einsum(s, a, b),
            )
            for function in functions:
                out, vjp = jax.vjp(function, *pair)
                # A gradient whose entries differ, so that a transposition shows.
                weights = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape) % 7
                results.append((out, *vjp(weights)))
        return results

    results = both(arrays)
    for case, ours, expected in zip(CASES, results[::2], results[1::2], strict=True):
        for found, wanted in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=str(case))


def test_quantizes_as_the_dot_that_it_is():
    lhs = np.random.default_rng(0).standard_normal((2, 6, 4, 8)).astype(np.float32)
    rhs = np.random.default_rng(1).standard_normal((4, 8, 5)).astype(np.float32)
    for recipe in ("int8-row", "fp8-current", "fp8-current/fwd=int8:tile4,int8:block1"):
        found = q8jax.einsum("bthk,hkd->dbt", lhs, rhs, recipe)
        flat = lhs.reshape(12, 32), rhs.reshape(32, 5)
        wanted = q8jax.dot_general(*flat, (((1,), (0,)), ((), ())), recipe)
        np.testing.assert_array_equal(found, wanted.T.reshape(5, 2, 6))
        exact = np.einsum("bthk,hkd->dbt", lhs, rhs)
        assert 0.002 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.06


def test_passes_on_scale_key_and_dtype():
    x = jnp.ones((2, 4), jnp.bfloat16)
    out = q8jax.einsum("ij,kj->ik", x, x, "fp8", jnp.ones(3), preferred_element_type=jnp.float32)
    assert out.dtype == jnp.float32
    with pytest.raises(ValueError, match="pass scale="):
        q8jax.einsum("ij,kj->ik", x, x, "fp8")
    noisy = "fwd=int8:tensor:current:stochastic,none"
    with pytest.raises(ValueError, match="needs key="):
        q8jax.einsum("ij,kj->ik", x, x, noisy)
    assert q8jax.einsum("ij,kj->ik", x, x, noisy, key=jax.random.key(0)).shape == (2, 2)


@pytest.mark.parametrize(
    "subscripts, message",
    [
        ("ij->ij", "must have two operands"),
        ("ij,jk,kl->il", "must have two operands"),
        ("ii,ij->j", "repeats an index within one operand"),
        ("ij,jk->ii", "repeats an index within one result"),
        ("ij,jk->il", "has l in its result but in no operand"),
        ("i,jk->ik", "'i' does not fit an operand of rank 2"),
        ("ijk,jk->ik", "'ijk' does not fit an operand of rank 2"),
        ("i.j,jk->ik", "'i.j' does not fit"),
        ("i..j,jk->ik", "'i..j' does not fit"),
        ("i1,1k->ik", "'i1' does not fit"),
        ("ij,jk-ik", "'jk-ik' does not fit"),
        ("ik,jk->ij->", "has "),
        ("ji,jk->ik", "has index j of sizes 2 and 3"),
        ("...ij,...ijk->...k", "'...ijk' does not fit"),
    ],
)
def test_what_is_no_dot_raises_one_sentence(subscripts, message):
    with pytest.raises(ValueError, match=message) as error:
        q8jax.einsum(subscripts, jnp.ones((2, 3)), jnp.ones((3, 4)), "fp32")
    assert subscripts in str(error.value) and "\n" not in str(error.value)


def test_letters_never_run_out_silently():
    """Ellipses stand for axes of their own, whatever letters are in use."""
    plan = as_dot("A...b,b...C->...AC", (2, 3, 4, 5), (5, 3, 4, 6))
    assert plan.dimension_numbers == (((3,), (0,)), ((1, 2), (1, 2)))
    assert plan.permutation == (0, 1, 2, 3)
