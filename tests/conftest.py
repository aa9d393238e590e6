"""Settings under which every test runs: strict promotion, no rank promotion, eight host devices."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read once, when gcsfs is imported: else it asks the real service, by gRPC, what kind of bucket it is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import flax
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, flax {flax.__version__}, {jax.device_count()} devices"
