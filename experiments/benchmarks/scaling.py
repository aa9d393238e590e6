"""The training step of experiments.pretrain at the same work on more and more devices, by mesh.

Where each device brings its own cores, twice as many take half the time at best. Host devices share the cores that one
has to itself: at best they take as long as one, and what is above is what partitioning costs.
"""

import functools
from collections.abc import Callable, Sequence

import jax

from experiments import options
from experiments.benchmarks.contest import contest
from experiments.benchmarks.results import Measurement
from experiments.benchmarks.steps import Entrant
from experiments.job import Job
from experiments.models.shardings import AXES
from q8jax import choices

ONE = "data:1"


def meshes(axes: Sequence[str], devices: int) -> list[str]:
    """One device, and 2, 4, 8, … of them along each axis, as --mesh has it.

    Raises:
      ValueError: an axis that no mesh has, or one device alone.
    """
    for axis in axes:
        choices.check("--axes", axis, AXES)
    if devices < 2:
        raise ValueError(
            "--level=scaling needs several devices: on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=8."
        )
    sizes = [2**power for power in range(1, devices.bit_length())]
    return [ONE, *(f"{axis}:{size}" for axis in axes for size in sizes)]


def measure(precision: str, axes: Sequence[str], rounds: int, vocab: int | None = None) -> Measurement:
    """Times the training step that the parsed flags describe on each mesh, all with the same global batch.

    Args:
      precision: as `--precision` takes it.
      axes: of the meshes, each alone.
      rounds: timed steps of each.
      vocab: size of the vocabulary; by default as --model has it.

    Raises:
      ValueError: flags that do not describe a step, or as `meshes`.
    """
    devices = jax.devices()
    _, *others = meshes(axes, len(devices))
    options.FLAGS["precision"].value = precision

    def job(mesh: str) -> Job:
        options.FLAGS["mesh"].value = mesh
        return Job.of_flags(devices, vocab)

    one = job(ONE)
    builders: dict[str, Callable[[], Entrant]] = {ONE: lambda: Entrant(one, {})}
    # A mesh that does not divide the model is reported as one that does not run.
    builders |= {mesh: functools.partial(lambda mesh: Entrant(job(mesh), {}), mesh) for mesh in others}
    chosen, config = one.options, one.trainer.config
    tokens = chosen.batch_size * chosen.seq_len
    sizes = {"parameters": config.params, "batch": chosen.batch_size, "sequence": chosen.seq_len, "tokens": tokens}
    flops = config.flops_per_token(chosen.seq_len) * tokens
    return contest(precision, sizes, flops, builders, ONE, rounds, devices=len(devices))
