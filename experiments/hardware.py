"""What the devices could do at best, for MFU."""

# Dense peak of one device in FLOP/s in 16 bits, from the vendors' data sheets. MFU is against this number in every
# precision, so that a faster format shows as a higher utilization and curves stay comparable.
_PEAK_BF16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense 16-bit FLOP/s of one device, or None where it is not known (a CPU, say)."""
    matches = [name for name in _PEAK_BF16 if device_kind.startswith(name)]
    return _PEAK_BF16[max(matches, key=len)] if matches else None
