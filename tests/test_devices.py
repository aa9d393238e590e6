"""What is known of chips, and which precision each of them is advised."""

import pytest

from q8jax import recommend
from q8jax.devices import DEVICES, get_device


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU7x", 2307 / 2),
    ],
)
def test_devices_are_found_by_the_longest_name(kind, teraflops):
    assert get_device(kind).bf16 == teraflops * 1e12


def test_nothing_is_known_of_other_devices():
    assert get_device("cpu") is None
    with pytest.raises(ValueError, match="Nothing is known of 'NVIDIA Foo': name the precision, fp8 or int8"):
        recommend("NVIDIA Foo")


@pytest.mark.parametrize(
    ("kind", "precision", "reason"),
    [
        ("TPU v5 lite", "int8", "INT8 2 times as fast as bfloat16, and FP8 not at all"),
        ("TPU v5", "int8", "INT8 2 times"),
        ("TPU v6 lite", "int8", "INT8 2 times"),
        ("TPU7x", "fp8", "FP8 2 times as fast as bfloat16, and INT8 not at all"),
        ("NVIDIA H100 80GB HBM3", "fp8", "FP8 2 times"),
        ("NVIDIA L40S", "fp8", "FP8 2.02 times"),
        ("NVIDIA B200", "fp8", "FP8 2 times"),
        ("NVIDIA A100-SXM4-80GB", "int8", "INT8 2 times as fast as bfloat16, and FP8 not at all"),
        ("TPU v4", "int8", "no faster than bfloat16"),
        ("cpu", "int8", "emulates"),
    ],
)
def test_the_advice_is_the_format_that_a_chip_rewards(kind, precision, reason):
    advice = recommend(kind)
    assert advice.precision == precision and reason in advice.reason


def test_no_chip_is_slower_in_fewer_bits():
    for name, device in DEVICES.items():
        assert all(peak is None or peak >= device.bf16 for peak in (device.fp8, device.int8)), name
