"""q8jax: low-precision training and inference numerics for JAX."""

from q8jax import stats
from q8jax.audit import audit
from q8jax.conv import conv_general_dilated
from q8jax.devices import Recommendation, recommend
from q8jax.dot import Prequantized, dot_general, einsum, prequantize
from q8jax.formats import FORMATS, Format, cast, decode, get_format
from q8jax.policy import Policy
from q8jax.presets import PRECISIONS, Precision
from q8jax.qarray import QArray, quantize
from q8jax.recipe import Gemm, Operand, Recipe
from q8jax.recompute import recomputing
from q8jax.report import Report
from q8jax.scaling import ScalingState

__all__ = [
    "FORMATS",
    "PRECISIONS",
    "Format",
    "Gemm",
    "Operand",
    "Policy",
    "Precision",
    "Prequantized",
    "QArray",
    "Recipe",
    "Recommendation",
    "Report",
    "ScalingState",
    "audit",
    "cast",
    "conv_general_dilated",
    "decode",
    "dot_general",
    "einsum",
    "get_format",
    "prequantize",
    "quantize",
    "recommend",
    "recomputing",
    "stats",
]
__version__ = "0.1.0"
