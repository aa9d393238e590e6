"""How eight devices share a step: what the scaling state must not depend on."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

AUTOMATIC = Mesh(np.array(jax.devices()), ("data",))
EXPLICIT = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))

on_eight_devices = pytest.mark.parametrize(
    ("mesh", "weights"),
    [(AUTOMATIC, P()), (AUTOMATIC, P(None, "data")), (EXPLICIT, P())],
    ids=["batch", "batch and weights", "batch by type"],
)
