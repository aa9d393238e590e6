"""A convolution and its two gradients, each as one product of codes.

Each is a convolution itself: the gradient of lhs one of the result's gradient with the kernel reversed, the gradient of
the kernel one of lhs with the result's gradient for a kernel. A scale that is constant along the axes that are summed
and along the spatial ones, over which windows slide, is a factor of the result. So a 'row' of lhs, and of the gradient,
is an example, and a row of the kernel a channel; in the kernel's gradient, which is summed over all else, a row is a
channel of either.

What runs depends on what a backend is fast at. XLA:CPU is so at convolutions in float32, at those of integers in one
layout alone, and at products of integers. So a CPU convolves codes in float32, which holds them and sums of integers
below 2^24, and multiplies patches, what the window sees copied as codes, where sums of integers are longer, as in drhs.
Compiled for TPUs a convolution of codes is one fusion, without copies. XLA:GPU has FP8 and integer convolutions for fwd
and dlhs, but widens the codes of drhs; patches are multiplied by cuBLASLt as codes in all three.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from q8jax.contraction import Axes, Contraction
from q8jax.formats import as_bytes, decode, get_format, of_bytes
from q8jax.gemm import FP8_PAIRS, MAX_PIECES, gemm, precision_for, rescale
from q8jax.qarray import QArray
from q8jax.windows import Window

Array = jax.Array
Operand = QArray | Array


@dataclasses.dataclass(frozen=True)
class Product:
    """One of the three products, and all that its operands' shapes decide about it.

    Attributes:
      roles: of the axes of the operands; scales may change along batch and free ones.
      window: of the second operand, as the kernel of a convolution, on the first.
      numbers: of that convolution.
      crossed: for each operand, whether its last two axes stand the other way round in the result.
      cut: for each operand the axis along which sums can be cut.
      length: how many products are summed for each entry of the result, of which the padding's are zero.
      patches: the window whose patches of the first operand are multiplied with the second one.
      contraction: of these.
      is_of_kernel: whether it is drhs, whose patches have their sums along the last axes.
      is_grouped: whether features are in groups, with an axis of their own.
    """

    roles: tuple[Axes, Axes]
    window: Window
    numbers: lax.ConvDimensionNumbers
    crossed: tuple[bool, bool]
    cut: tuple[int, int]
    length: int
    patches: Window
    contraction: Contraction
    is_of_kernel: bool
    is_grouped: bool

    def unfold(self, first: Array) -> Array:
        """Patches [N, *positions, *kernel, (G), C] of the first operand, of drhs [*kernel, (G), C, N, *positions]."""
        order, start, at = self._places
        patches = self.patches.unfold(as_bytes(lax.transpose(first, order)), start, at)
        return of_bytes(patches, first.dtype)

    def unfolded(self, first: Operand) -> Operand:
        """As `unfold`, also of codes, with their scales."""
        if not isinstance(first, QArray):
            return self.unfold(first)
        order, _, at = self._places
        scale = lax.expand_dims(lax.transpose(first.scale, order), range(at, at + len(self.window.size)))
        return dataclasses.replace(first, qvalue=self.unfold(first.qvalue), scale=scale)

    @property
    def _places(self) -> tuple[tuple[int, ...], int, int]:
        """An order of the first operand's axes, the first spatial one in it, and where those of the kernel come."""
        spatial, ndim = len(self.window.size), len(self.roles[0].kept) + len(self.roles[0].contracting)
        if not self.is_of_kernel:
            return tuple(range(ndim)), 1, spatial + 1
        # Codes are brought where what is summed comes last before there are more of them.
        return (*range(spatial + 1, ndim), *range(spatial + 1)), ndim - spatial, 0

    def convolve(self, first: Array, second: Array, dtype: np.dtype | type, precision: lax.Precision | None) -> Array:
        """The convolution itself, of arrays without groups."""
        window = self.window
        if window.is_reversed:
            second = lax.rev(second, self.numbers.rhs_spec[2:])
        return lax.conv_general_dilated(
            first,
            second,
            window.strides,
            window.padding,
            lhs_dilation=window.base_dilation,
            rhs_dilation=window.dilation,
            dimension_numbers=self.numbers,
            precision=precision,
            preferred_element_type=dtype,
        )

    def spread(self, scale: Array, position: int) -> Array:
        """The scales of an operand in the shape of the result, 1 where they do not depend on it."""
        scale = scale.astype(jnp.float32)
        return jnp.swapaxes(scale, -1, -2) if self.crossed[position] else scale


@functools.cache
def products(lhs_shape: tuple[int, ...], window: Window, outputs: int, is_grouped: bool) -> dict[str, Product]:
    """The products 'fwd' (lhs, rhs), 'dlhs' (grad, rhs) and 'drhs' (lhs, grad).

    Args:
      lhs_shape: [N, *spatial, (G), C].
      window: of rhs [*kernel, C, (G), O].
      outputs: O.
      is_grouped: whether the axis G is there.
    """
    n, g = len(window.size), int(is_grouped)
    spatial, last, group = tuple(range(1, n + 1)), n + 1 + g, (n + 1,) * g
    sizes, batch, channels = lhs_shape[1 : n + 1], lhs_shape[0], lhs_shape[-1]
    kernel = tuple(range(n))
    positions = window.positions(sizes)
    of_example = Axes(group, (0,), (*spatial, last))
    of_channel = Axes(group, (last,), (0, *spatial))
    to_output = Axes(group, (last,), (*kernel, n))
    to_input = Axes(group, (n,), (*kernel, last))

    patch = Axes((2 * n + 1,) * g, (0, *spatial), (*range(n + 1, 2 * n + 1), 2 * n + 1 + g))
    patch_of_kernel = Axes((n,) * g, (*kernel, n + g), tuple(range(n + g + 1, 2 * n + g + 2)))
    # Groups come first out of a product of matrices.
    in_place = (*range(g, g + n + 1), *range(g), n + 1 + g)

    def image(features: tuple[int, int]) -> lax.ConvDimensionNumbers:
        """Of [N, *spatial, features] with a kernel whose (output, input) features are on these axes."""
        return lax.ConvDimensionNumbers((0, n + 1, *spatial), (*features, *kernel), (0, n + 1, *spatial))

    gradient = window.transposed(sizes)
    common = {"is_of_kernel": False, "is_grouped": is_grouped}
    return {
        "fwd": Product(
            (of_example, to_output),
            window,
            image((n + 1, n)),
            (False, False),
            (n + 1, n),
            math.prod(window.size) * channels,
            window,
            Contraction(patch, to_output, in_place),
            **common,
        ),
        "dlhs": Product(
            (of_example, to_input),
            gradient,
            image((n, n + 1)),
            (False, True),
            (n + 1, n + 1),
            math.prod(window.size) * outputs,
            gradient,
            Contraction(patch, to_input, in_place),
            **common,
        ),
        "drhs": Product(
            (of_channel, of_channel),
            window.on_result(sizes),
            lax.ConvDimensionNumbers((n + 1, 0, *spatial), (n + 1, 0, *spatial), (n, n + 1, *kernel)),
            (True, False),
            (0, 0),
            math.prod(positions) * batch,
            window,
            Contraction(patch_of_kernel, of_channel, in_place),
            is_of_kernel=True,
            is_grouped=is_grouped,
        ),
    }


def convolve(
    first: Operand,
    second: Operand,
    product: Product,
    dtype: np.dtype,
    *,
    accurate: bool,
    powers_of_two: bool,
) -> Array:
    """`gemm.gemm` for a product of a convolution: the same arguments, and the same contract."""

    def of_patches(first: Operand, second: Operand) -> Array:
        multiply = functools.partial(gemm, accurate=accurate, powers_of_two=powers_of_two)
        return multiply(product.unfolded(first), second, product.contraction, dtype)

    if product.is_grouped:
        return of_patches(first, second)
    if not (isinstance(first, QArray) and isinstance(second, QArray)):
        return _convolve_wide(first, second, product, dtype)
    names = first.qtype, second.qtype
    integers = all(get_format(name).kind == "int" for name in names)
    largest = int(get_format(names[0]).max * get_format(names[1]).max)
    pieces = -(-product.length * largest // 2**24)
    is_long = pieces > min(MAX_PIECES, first.shape[product.cut[0]])

    def scaled(sums: Array, first: QArray, second: QArray) -> Array:
        scales = product.spread(first.scale, 0), product.spread(second.scale, 1)
        return rescale(sums, *scales, whole=integers).astype(dtype)

    def in_type(kind: np.dtype | type, a: Array, b: Array) -> Array:
        return product.convolve(decode(a, names[0], kind), decode(b, names[1], kind), jnp.float32, None)

    def on_cpu(first: QArray, second: QArray) -> Array:
        if integers and (product.is_of_kernel or is_long):
            return of_patches(first, second)
        exact = functools.partial(in_type, jnp.float32)
        if not integers or pieces <= 1:
            return scaled(exact(first.qvalue, second.qvalue), first, second)
        in_int32 = lambda a, b: exact(a, b).astype(jnp.int32)
        sums = _sum_of_pieces(in_int32, first.qvalue, second.qvalue, product, pieces)
        return scaled(sums.astype(jnp.float32), first, second)

    def on_gpu(first: QArray, second: QArray) -> Array:
        if integers or set(names) in FP8_PAIRS:
            return of_patches(first, second)
        # It takes a cast to 8 bits and back for the identity.
        return elsewhere(*lax.optimization_barrier((first, second)))

    def elsewhere(first: QArray, second: QArray) -> Array:
        a, b = first.qvalue, second.qvalue
        if integers:
            as_int8 = lambda a, b: product.convolve(a.astype(jnp.int8), b.astype(jnp.int8), jnp.int32, None)
            in_float32 = lambda a, b: as_int8(a, b).astype(jnp.float32)
            sums = _sum_of_pieces(in_float32, a, b, product, -(-product.length * largest // (2**31 - 1)))
        elif names[0] == names[1] and set(names) in FP8_PAIRS:
            sums = product.convolve(a, b, jnp.float32, lax.Precision.HIGHEST if accurate else None)
        else:
            # JAX convolves no two formats; all codes are exact in bfloat16.
            sums = in_type(jnp.bfloat16, a, b)
        return scaled(sums, first, second)

    return lax.platform_dependent(first, second, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


def _convolve_wide(first: Operand, second: Operand, product: Product, dtype: np.dtype) -> Array:
    """The convolution of which at most one operand is quantized, in the dtype of the other."""
    wide = second if isinstance(first, QArray) else first
    assert not isinstance(wide, QArray)
    both = not isinstance(first, QArray) and not isinstance(second, QArray)
    float32 = np.dtype(jnp.float32)

    def run(kind: np.dtype, sum_dtype: np.dtype, *operands: Operand) -> Array:
        values, scales = [], []
        for position, operand in enumerate(operands):
            if not isinstance(operand, QArray):
                values.append(operand.astype(kind))
                continue
            # As in gemm: codes of at most 1, for sums of larger ones may overflow although the result does not.
            exponent = 0 if wide.dtype == jnp.float16 else math.ceil(math.log2(get_format(operand.qtype).max))
            values.append(decode(operand.qvalue, operand.qtype, kind) * np.asarray(2.0**-exponent, kind))
            scales = [product.spread(operand.scale, position), jnp.float32(2.0**exponent)]
        sums = product.convolve(values[0], values[1], sum_dtype, precision_for(kind))
        return (rescale(sums, *scales) if scales else sums).astype(dtype)

    def elsewhere(first: Operand, second: Operand) -> Array:
        # XLA:GPU takes a cast to 8 bits and back for the identity.
        hidden = [lax.optimization_barrier(x) if isinstance(x, QArray) else x for x in (first, second)]
        # A product whose result has the dtype of its operands rounds the float32 sums itself.
        return run(wide.dtype, dtype if both and wide.dtype == dtype else float32, *hidden)

    on_cpu = functools.partial(run, float32, float32)
    return lax.platform_dependent(first, second, cpu=on_cpu, default=elsewhere)


def _sum_of_pieces(
    convolve_codes: Callable[[Array, Array], Array], a: Array, b: Array, product: Product, pieces: int
) -> Array:
    """The sum of convolutions of at least so many pieces along the axes that can be cut."""
    size = a.shape[product.cut[0]]
    step = max(1, size // max(1, pieces))
    sums = [
        convolve_codes(
            lax.slice_in_dim(a, start, min(start + step, size), axis=product.cut[0]),
            lax.slice_in_dim(b, start, min(start + step, size), axis=product.cut[1]),
        )
        for start in range(0, size, step)
    ]
    return functools.reduce(jnp.add, sums)
