"""Post-training quantization: pure functions over the inputs and weights of one product, inputs @ weights.

Statistics of inputs are collected batch by batch (`inputs`, and the calibrators), then decide how weights are rounded
and over which range inputs are. Nothing here knows layers, models or data.
"""

from q8jax.ptq import inputs
from q8jax.ptq.awq import Scaling, scaling_factors, search_scaling
from q8jax.ptq.bias import bias_correction
from q8jax.ptq.clipping import clip
from q8jax.ptq.gptq import gptq
from q8jax.ptq.histogram import Histogram
from q8jax.ptq.inputs import Inputs, relative_error, squared_error
from q8jax.ptq.outliers import Split, channels_above, largest_channels, split, split_inputs
from q8jax.ptq.ranges import Calibrator, Range, min_max, moving_average
from q8jax.ptq.smooth import Smoothing, search_smoothing, smooth_inputs, smooth_weights, smoothing_factors
from q8jax.ptq.target import Target
from q8jax.ptq.thresholds import entropy, mean_squared_error, percentile

__all__ = [
    "Calibrator",
    "Histogram",
    "Inputs",
    "Range",
    "Scaling",
    "Smoothing",
    "Split",
    "Target",
    "bias_correction",
    "channels_above",
    "clip",
    "entropy",
    "gptq",
    "inputs",
    "largest_channels",
    "mean_squared_error",
    "min_max",
    "moving_average",
    "percentile",
    "relative_error",
    "scaling_factors",
    "search_scaling",
    "search_smoothing",
    "smooth_inputs",
    "smooth_weights",
    "smoothing_factors",
    "split",
    "split_inputs",
    "squared_error",
]
