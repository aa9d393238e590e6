"""The precision registry: every name that `--precision` takes, one row each.

`fp8` and `int8` run all three GEMMs in 8 bits; a recipe that does less has another name. That gradients of `fp8` are in
E4M3 is a result: with the usual E5M2 it was not at parity with BF16 (results/README.md, recipes).
"""

import dataclasses
from types import MappingProxyType

from q8jax.recipe import Gemm, Operand, Recipe


@dataclasses.dataclass(frozen=True)
class Precision:
    """A named recipe.

    Attributes:
      recipe: what it resolves to.
      summary: what it does and when to choose it, in a sentence or two.
      source: the paper or implementation that it follows.
    """

    recipe: Recipe
    summary: str
    source: str


def _uniform(forward: str, gradient: str, granularity: str, scaling: str, scales: str = "float32") -> Recipe:
    operand, grad = (Operand(qtype, granularity, scaling) for qtype in (forward, gradient))
    return Recipe(Gemm(operand, operand), Gemm(grad, operand), Gemm(operand, grad), scales=scales)


def _deepseek(k: int) -> Recipe:
    tile, block = Operand("e4m3fn", f"tile{k}"), Operand("e4m3fn", f"block{k}")
    return Recipe(Gemm(tile, block), Gemm(tile, block), Gemm(tile, tile), scales="power_of_two")


def _int8() -> Recipe:
    row, weight = Operand("int8", "row"), Operand("int8", "tensor", "delayed")
    return Recipe(Gemm(row, weight), Gemm(row, weight), Gemm(row, row))


def _switchback() -> Recipe:
    row, tensor = Operand("int8", "row"), Operand("int8", "tensor")
    return Recipe(Gemm(row, tensor), Gemm(row, tensor), Gemm())


PRECISIONS = MappingProxyType(
    {
        "fp32": Precision(
            Recipe(compute="float32"),
            "Everything in float32, at the highest matmul precision of the device: the reference.",
            "IEEE 754 binary32.",
        ),
        "bf16": Precision(
            Recipe(),
            "GEMMs and activations in bfloat16, master weights in float32: the 16-bit baseline.",
            "Kalamkar et al. 2019, A study of BFLOAT16 for deep learning training, arXiv:1905.12322.",
        ),
        "fp16": Precision(
            Recipe(compute="float16"),
            "GEMMs and activations in float16; the trainer adds dynamic loss scaling.",
            "Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740.",
        ),
        "fp8": Precision(
            _uniform("e4m3fn", "e4m3fn", "tensor", "delayed", scales="power_of_two"),
            "All three GEMMs in FP8, E4M3 throughout, delayed scaling per tensor, power-of-two scales (headroom is "
            "nearly free in a float format, and such a scale commutes with every rounding).",
            "Micikevicius et al. 2022, FP8 formats for deep learning, arXiv:2209.05433; delayed scaling as in "
            "Transformer Engine; E4M3 for gradients too as in DeepSeek-AI 2024, arXiv:2412.19437, section 3.3 (there "
            "in tiles).",
        ),
        "fp8-hybrid": Precision(
            _uniform("e4m3fn", "e5m2", "tensor", "delayed", scales="power_of_two"),
            "As fp8, gradients in E5M2: one bit of mantissa less, 14 binades more range, for gradients that underflow.",
            "Micikevicius et al. 2022, arXiv:2209.05433; the hybrid format of Transformer Engine.",
        ),
        "fp8-current": Precision(
            _uniform("e4m3fn", "e5m2", "tensor", "current"),
            "As fp8-hybrid, each scale from the tensor's own amax: no state, one more read of each tensor.",
            "Micikevicius et al. 2022, arXiv:2209.05433; per-tensor current scaling of Transformer Engine.",
        ),
        "fp8-row": Precision(
            _uniform("e4m3fn", "e4m3fn", "row", "current", scales="power_of_two"),
            "All three GEMMs in E4M3, one scale per row and per column of each GEMM, power-of-two scales.",
            "Row-wise scaling of torchao's float8 training recipes.",
        ),
        "fp8-block": Precision(
            _deepseek(128),
            "E4M3 throughout: activations and gradients in 1×128 tiles, weights in 128×128 "
            "blocks, partial sums promoted to float32 at each tile.",
            "DeepSeek-AI 2024, DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3.",
        ),
        "fp8-e3m4": Precision(
            _uniform("e3m4", "e4m3fn", "tensor", "delayed", scales="power_of_two"),
            "As fp8, but E3M4 forward: one more bit of mantissa, 8 binades less range.",
            "Shen et al. 2023, Efficient post-training quantization with FP8 formats, arXiv:2309.14592.",
        ),
        "mxfp8": Precision(
            _uniform("e4m3fn", "e4m3fn", "tile32", "current", scales="e8m0"),
            "All three GEMMs in E4M3 with one E8M0 scale per 32 values along the contraction, rounded up.",
            "Mishra et al. 2025, Recipes for pre-training LLMs with MXFP8, arXiv:2506.08027.",
        ),
        "int8": Precision(
            _int8(),
            "All three GEMMs in INT8. Integers have no exponent to absorb outliers, so each row of activations and "
            "gradients, and in the weight's gradient each column, has its own scale; a weight has one, from the steps "
            "before, so it is quantized in one pass. Calibrate it; int8-row keeps no state.",
            "Wortsman et al. 2023, arXiv:2304.13013, section 2, for the first two; the weight's gradient vector-wise, "
            "as in Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339.",
        ),
        "int8-row": Precision(
            _uniform("int8", "int8", "row", "current"),
            "All three GEMMs in INT8, one scale per row and per column of each GEMM, from the tensors themselves.",
            "Vector-wise scales as in Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, in all three GEMMs.",
        ),
        "int8-block": Precision(
            _uniform("int8", "int8", "block32", "current"),
            "All three GEMMs in INT8 with one scale per 32×32 block.",
            "Xi et al. 2024, Jetfire: efficient and accurate transformer pretraining with INT8 "
            "data flow and per-block quantization, arXiv:2403.12422.",
        ),
        "int8-tensor": Precision(
            _uniform("int8", "int8", "tensor", "current"),
            "All three GEMMs in INT8 with one scale per tensor: the scheme known to train badly, kept as a control.",
            "Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, shows why.",
        ),
        "fp8-unscaled": Precision(
            _uniform("e4m3fn", "e5m2", "tensor", "unit"),
            "FP8 as it is, every scale 1: gradients vanish below the smallest E5M2 number. A control that must fail.",
            "Micikevicius et al. 2022, arXiv:2209.05433, section 3, on why tensors are scaled.",
        ),
        "int8-switchback": Precision(
            _switchback(),
            "INT8 forward and input gradient, rows against one scale for the weight; the weight gradient in 16 bits.",
            "Wortsman et al. 2023, Stable and low-precision training for large-scale "
            "vision-language models, arXiv:2304.13013, section 2.",
        ),
    }
)
