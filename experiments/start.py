"""From the parsed flags to a run that can start: what is wrong with them shows before JAX looks for devices."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from absl import flags

from experiments import options, processes

if TYPE_CHECKING:
    from experiments.training.run import Run

FLAGS = flags.FLAGS


def checked_run() -> Run:
    """The run that the parsed flags ask for, with its data loaded and nothing compiled.

    Raises:
      ValueError: one sentence that names the flag and the fix.
      runs.RunError: --config cannot be read.
    """
    from experiments.runs.config import config_differences, load_config

    config = load_config(FLAGS.config) if FLAGS.config else None
    if FLAGS.precision == "auto":
        processes.join(FLAGS.multihost)
        FLAGS["precision"].value = _recommended()
    chosen = options.from_flags(config)
    _prepare_xla(deterministic=chosen.deterministic)
    processes.join(FLAGS.multihost)
    processes.expect(FLAGS.expect_processes, FLAGS.expect_devices)

    import jax

    if config is None and jax.process_count() > 1 and options.fit_batch(jax.device_count()):
        chosen = options.from_flags()
        _say(f"--batch_size is {chosen.flags['batch_size']}, for {jax.device_count()} devices")

    from experiments import data
    from experiments.runs.environment import usable_cores
    from experiments.training.mesh import Placement
    from experiments.training.run import Run

    # XLA:CPU cuts its loops into pieces for the cores that are there, but leaves their number out of the key.
    jax.config.update("jax_compilation_cache_dir", str(chosen.cache / f"xla-{usable_cores()}"))
    # The audit reads the names in a program, so programs that differ in names are two; lines of source are left out.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    placement = Placement.parse(chosen.mesh, chosen.microbatch, config=chosen.model)
    run = Run(chosen, data.load(chosen.data, chosen.tokenizer, chosen.cache), placement)
    if config is not None and options.repeats_config():
        for name, (then, now) in config_differences(config, run.config, options.MAY_CHANGE).items():
            raise ValueError(
                f"--config={FLAGS.config} cannot be repeated here: its {name} was {then}, and would be {now}."
            )
    return run


def _recommended() -> str:
    """The precision that the device here rewards; says why."""
    _prepare_xla(deterministic=FLAGS.deterministic)

    import jax

    from q8jax import recommend

    advice = recommend(jax.devices()[0].device_kind)
    _say(f"--precision=auto is {advice.precision}: {advice.reason}")
    return advice.precision


def _say(text: str) -> None:
    """Prints, on the first process."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def _prepare_xla(*, deterministic: bool) -> None:
    """Sets what XLA reads when the first device is asked for."""
    flag = "--xla_gpu_deterministic_ops=true"
    if deterministic and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
