"""Programs on top of q8jax, one job each, and `load_runs`, which reads what they leave without importing JAX."""

from typing import Any

__all__ = ["load_runs"]


def __getattr__(name: str) -> Any:
    # Not on import: reading takes pandas, which the programs that train do without.
    if name in __all__:
        from experiments import frames

        return getattr(frames, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
