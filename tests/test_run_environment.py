"""What env.json tells, and what it must not."""

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.runs import environment, peak_memory_bytes
from experiments.runs.environment import PACKAGES, git_revision

ROOT = Path(__file__).resolve().parents[1]


def test_the_environment_says_what_ran_where(monkeypatch):
    home = os.path.expanduser("~")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{home}/cache")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node17.example:8476")
    monkeypatch.setenv("OTHER_SECRET", "token")
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["argv"][1:] == sys.argv[1:] and not Path(found["argv"][0]).is_absolute()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert {*PACKAGES, "q8jax"} == found["versions"].keys()
    assert found["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert found["cpu"]["cores"] >= 1
    assert found["cpu"]["model"]
    assert found["start_time"].endswith("+00:00")
    variables = found["variables"]
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "~/cache"
    assert "device_count=8" in variables["XLA_FLAGS"]
    del found["argv"]
    text = json.dumps(found)
    for private in ("node17", "token", f"{home}/", f'"{socket.gethostname()}"'):
        assert private not in text
    if getpass.getuser() != "root":
        assert f"/{getpass.getuser()}/" not in text


def test_the_revision_is_that_of_the_checkout_that_tracks_the_code(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    code, other = tmp_path / "code.py", tmp_path / "installed.py"
    code.write_text("1")
    assert git_revision(code) is None
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "x")
    other.write_text("1")
    revision = git("rev-parse", "HEAD")
    assert git_revision(code) == {"revision": revision, "dirty": False}
    assert git_revision(other) is None
    code.write_text("2")
    assert git_revision(code) == {"revision": revision, "dirty": True}


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None


def test_peak_memory_on_cpu_is_what_the_kernel_says():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this kernel has no /proc")
    before = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    peak = peak_memory_bytes()
    after = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    # The kernel batches these counters per thread.
    assert before - 2**20 <= peak <= after + 2**20


def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    ballast = np.ones(2**29, np.uint8)
    say = "from experiments.runs import peak_memory_bytes as peak; print(peak())"
    told = subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True, cwd=ROOT)
    assert peak_memory_bytes() > ballast.nbytes > 0 and int(told.stdout) < ballast.nbytes


def test_peak_memory_on_an_accelerator_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3_000), Device(7_000)])
    assert peak_memory_bytes() == 7_000
