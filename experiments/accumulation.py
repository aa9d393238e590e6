"""Error of 8-bit GEMMs against float64, by the length K of their sums.

    python -m experiments.accumulation

prints a Markdown table for every backend that is there. Operands are standard normal values rounded to codes with
scale 1 (INT8: 30 times as large), so that nothing is lost but in the sums themselves; a cell is the norm of the error
over the norm of the exact result, both in float64. What is summed how is chosen by the recipe, `accumulation=fast` or
`accurate` (`--precision=fp8/accumulation=accurate`); where both give the same bits, the backend has only one way.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from q8jax import Recipe, decode, dot_general
from q8jax.qarray import encode

# Formats of the two operands, and how large values are drawn.
PRODUCTS = {
    "E4M3 × E4M3": ("e4m3fn", "e4m3fn", 1.0),
    "E5M2 × E4M3": ("e5m2", "e4m3fn", 1.0),
    "INT8 × INT8": ("int8", "int8", 30.0),
}
WAYS = ("fast", "accurate")
_NUMBERS = (((1,), (1,)), ((), ()))


def recipe_of(formats: Sequence[str], way: str) -> Recipe:
    """The recipe that multiplies codes of two formats with the scales it is given."""
    forward = ",".join(f"{name}:tensor:static" for name in formats)
    return Recipe.parse(f"fwd={forward}" + ("" if "int8" in formats else f"/accumulation={way}"))


def errors(name: str, length: int, rows: int, seed: int) -> dict[str, float]:
    """Relative errors of a product of PRODUCTS, rows × `length` by `length` × rows, for each of WAYS."""
    *formats, size = PRODUCTS[name]
    rng = np.random.default_rng([seed, length])
    operands = []
    for qtype in formats:
        values = jnp.asarray(size * rng.standard_normal((rows, length)), jnp.float32)
        operands.append(decode(encode(values, jnp.ones((1, 1), jnp.float32), qtype), qtype))
    exact = np.asarray(operands[0], np.float64) @ np.asarray(operands[1], np.float64).T
    found = {}
    for way in WAYS:
        recipe = recipe_of(formats, way)

        @jax.jit
        def product(lhs: jax.Array, rhs: jax.Array, recipe: Recipe = recipe) -> jax.Array:
            return dot_general(lhs, rhs, _NUMBERS, recipe, jnp.ones(len(recipe.slots), jnp.float32))

        result = np.asarray(product(*operands), np.float64)
        found[way] = float(np.linalg.norm(result - exact) / np.linalg.norm(exact))
    return found


def table(lengths: Sequence[int], rows: int, seed: int) -> str:
    """A Markdown table of `errors` on the default device."""
    lines = ["| relative error | " + " | ".join(f"K = {length}" for length in lengths) + " |"]
    lines.append("|---|" + "---|" * len(lengths))
    for name in PRODUCTS:
        by_length = [errors(name, length, rows, seed) for length in lengths]
        same = all(len(set(found.values())) == 1 for found in by_length)
        for way in WAYS[:1] if same else WAYS:
            label = f"{name}, {'fast and accurate alike' if same else way}"
            lines.append(f"| {label} | " + " | ".join(f"{found[way]:.1e}" for found in by_length) + " |")
    return "\n".join(lines)


def define_flags() -> None:
    """Defines this program's flags; not on import, so that programs can share a process and flag names."""
    flags.DEFINE_list("lengths", ["256", "1024", "4096", "16384", "65536"], "Values of K, each at least 1.")
    is_length = lambda lengths: bool(lengths) and all(text.isdigit() and int(text) for text in lengths)
    flags.register_validator("lengths", is_length, "use whole numbers, for example 1024,4096.")
    flags.DEFINE_integer("rows", 128, "M and N.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the operands.", lower_bound=0)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}: this program takes flags only.")
    logging.set_verbosity(logging.ERROR)  # JAX logs every backend that is not installed
    values = flags.FLAGS
    for device in dict.fromkeys((jax.devices()[0], jax.devices("cpu")[0])):
        with jax.default_device(device):
            print(table([int(text) for text in values.lengths], values.rows, values.seed))
        print(f"\n{values.rows} × K by K × {values.rows} on {device.device_kind}, jax {jax.__version__}.\n")


if __name__ == "__main__":
    define_flags()
    app.run(main)
