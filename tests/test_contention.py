"""What other work took of the machine while a run went on."""

import subprocess
import sys
import time

from experiments.comparing import contention
from experiments.comparing.contention import Contention

BUSY = [sys.executable, "-c", "import time\nstart = time.process_time()\nwhile time.process_time() < start + 0.5: pass"]


def test_own_work_is_not_that_of_others(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    taken = iter([100.0, 100.0])
    monkeypatch.setattr(contention, "_busy", lambda: next(taken) + contention._own())
    watched = Contention()
    subprocess.run(BUSY, check=True)
    assert watched.others() < 0.01


def test_what_others_take_is_a_share_of_all_processors(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    now = iter([10.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    busy, own = iter([100.0, 118.0]), iter([3.0, 11.0])
    monkeypatch.setattr(contention, "_busy", lambda: next(busy))
    monkeypatch.setattr(contention, "_own", lambda: next(own))
    assert Contention().others() == 0.25  # 10 of 40 seconds


def test_a_child_counts_once_it_has_been_waited_for():
    before = contention._own()
    busy = contention._busy()
    subprocess.run(BUSY, check=True)
    assert contention._own() - before > 0.4 and contention._busy() - busy > 0.3
