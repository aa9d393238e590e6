"""Runs that are killed, and disks that fill up, for real: in processes of their own."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KILLS = 3

# A run whose state is a function of the step, so that whatever it restores can be checked exactly.
RUN = """
    import sys, time
    import jax, jax.numpy as jnp, numpy as np
    from experiments.runs import Checkpoints, MetricsWriter, RunDir, read_metrics

    def state(step):
        noise = np.random.default_rng(step).random(300_000, np.float32)
        return {"w": jnp.asarray(noise), "key": jax.random.key_data(jax.random.key(step))}

    def check(restored):
        for name, leaf in state(restored.step).items():
            assert (np.asarray(restored.tree[name]) == np.asarray(leaf)).all(), name
        assert restored.metadata == {"half": restored.step / 2}

    workdir, last = sys.argv[1], int(sys.argv[2])
    run = RunDir.open(workdir, {"steps": 1000})
    checkpoints = Checkpoints(run.checkpoints, warn=lambda text: print("warning:", text))
    restored = checkpoints.latest_good(state(0))
    start = 0
    if restored is not None:
        check(restored)
        start = restored.step
    print("restored", start, flush=True)
    metrics = MetricsWriter(run.path, None if restored is None else start)
    for step in range(start + 1, last + 1):
        metrics.write(step, {"loss": np.float32(1 / step)})
        metrics.sync()
        checkpoints.save(step, state(step), {"half": step / 2})
        print("saving", step, flush=True)
    checkpoints.wait()
    check(checkpoints.latest_good(state(0)))
    records = read_metrics(run.path)
    assert [r["step"] for r in records] == list(range(1, last + 1))
    assert all(r["loss"] == float(np.float32(1 / r["step"])) for r in records)
    print("done", flush=True)
"""

FILL = """
    import sys
    import jax.numpy as jnp, numpy as np
    from experiments.runs import CheckpointError, Checkpoints

    def tree(step, size):  # of several arrays, whose writes fail one after another
        return dict(enumerate(map(jnp.asarray, np.random.default_rng(step).random((20, size // 20), np.float32))))

    SMALL, LARGE = 50_000, 2_000_000  # 0.2 MB, 8 MB
    warnings = []
    with Checkpoints(sys.argv[1], warn=warnings.append) as checkpoints:
        LIMIT
        checkpoints.save(1, tree(1, SMALL))
        checkpoints.wait()
        checkpoints.save(2, tree(2, LARGE))
        try:
            checkpoints.wait()
        except CheckpointError as error:
            print(error)
        assert len(warnings) == 1 and warnings[0].count("\\n") == 0, warnings
        assert checkpoints.steps() == [1]
        checkpoints.save(3, tree(3, SMALL))  # training goes on
        checkpoints.wait()
        assert len(warnings) == 1, warnings
        restored = checkpoints.latest_good(tree(0, SMALL))
        assert restored.step == 3
        assert all((np.asarray(leaf) == np.asarray(tree(3, SMALL)[name])).all() for name, leaf in restored.tree.items())
    print("done")
"""


def start(code, *arguments, prefix=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        [*prefix, sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_where_its_last_checkpoint_was(tmp_path):
    random.seed(0)
    reached = 0
    for _ in range(KILLS):
        process = start(RUN, str(tmp_path / "run"), "1000")
        first = process.stdout.readline().split()
        assert first and first[0] == "restored", [*first, process.stderr.read()]
        # It printed "saving N" only after N - 1 was complete.
        assert int(first[1]) >= reached - 1, (first, reached)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        output, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert "warning:" not in output
        saving = [int(line.split()[1]) for line in output.splitlines() if line.startswith("saving")]
        reached = max(saving, default=int(first[1]))
    process = start(RUN, str(tmp_path / "run"), str(reached + 2))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.endswith("done\n")
    assert "warning:" not in output
    assert not list((tmp_path / "run" / "checkpoints").glob("*.*"))


def check_full_disk(process, reason):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.endswith("done\n")
    assert "the checkpoint of step 2 could not be written to" in output
    assert reason in output
    assert "step 1 is the newest" in output
    assert errors == ""  # no traceback from Orbax


@pytest.mark.slow
def test_a_checkpoint_larger_than_a_file_may_be_spares_the_older_ones(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    check_full_disk(start(FILL.replace("LIMIT", limit), str(tmp_path)), "file too large")


def test_a_disk_that_fills_up_during_a_save_spares_the_older_checkpoints(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=4m none {tmp_path}"
    try:
        subprocess.run([*namespace, mount], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("a small file system cannot be mounted here")
    prefix = [*namespace, f'{mount} && exec "$@"', "sh"]
    process = start(FILL.replace("LIMIT", "pass"), str(tmp_path), prefix=prefix)
    check_full_disk(process, "no space left on device")
