"""A run on disk: what stands in `--workdir`, and how it survives being killed.

run = RunDir.open(workdir, config, may_change={"log_every"})
run.record_session(environment())
with Checkpoints(run.checkpoints, check=run.check, before=run.push) as checkpoints, StopSignal() as stop:
    restored = checkpoints.latest_good(state)
    start = 0 if restored is None else restored.step
    metrics = MetricsWriter(run.path, None if restored is None else restored.step)
    for step in range(start + 1, steps + 1):
        ...                                   # train; log every step up to S before saving S
        metrics.write(step, {"loss": loss})
        stopped = stop.reached(step)
        if step % checkpoint_every == 0 or stopped:
            metrics.sync()
            checkpoints.save(step, state, {"data": ...})
        if stopped:
            break
    checkpoints.wait()
"""

from experiments.runs.agreement import check_shared, first_process_says
from experiments.runs.checkpoint import Checkpoints, Restored
from experiments.runs.cleanexit import StopSignal
from experiments.runs.config import load_config
from experiments.runs.environment import environment, peak_memory_bytes
from experiments.runs.errors import CheckpointError, RunError
from experiments.runs.maintenance import MaintenanceNotice
from experiments.runs.metrics import METRICS, TELEMETRY, MetricsWriter, read_metrics
from experiments.runs.progress import Progress
from experiments.runs.rundir import RunDir

__all__ = [
    "METRICS",
    "TELEMETRY",
    "CheckpointError",
    "Checkpoints",
    "MaintenanceNotice",
    "MetricsWriter",
    "Progress",
    "Restored",
    "RunDir",
    "RunError",
    "StopSignal",
    "check_shared",
    "environment",
    "first_process_says",
    "load_config",
    "peak_memory_bytes",
    "read_metrics",
]
