"""The prefetcher keeps order, stays within its depth, passes errors on and stops."""

import threading
import time

import pytest

from experiments.data import prefetch


def workers() -> int:
    return sum(thread.name.startswith("prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (7, 9), (3, 3)])
def test_yields_every_step_in_order(depth, start, stop):
    assert list(prefetch(lambda step: step * step, start, stop, depth)) == [step * step for step in range(start, stop)]
    assert workers() == 0


def test_runs_ahead_on_another_thread_but_not_beyond_its_depth():
    made: list[int] = []
    threads = set()

    def make(step):
        threads.add(threading.current_thread().name)
        made.append(step)
        return step

    batches = prefetch(make, 0, 100, depth=3)
    assert next(batches) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]
    assert threading.current_thread().name not in threads
    batches.close()
    assert workers() == 0


def test_an_exception_arrives_at_its_own_step():
    def make(step):
        if step == 3:
            raise ValueError("step three")
        return step

    seen = []
    with pytest.raises(ValueError, match="step three"):
        for batch in prefetch(make, 0, 10):
            seen.append(batch)
    assert seen == [0, 1, 2]
    assert workers() == 0


def test_leaving_the_loop_ends_the_thread():
    for batch in prefetch(lambda step: step, 0, 10):
        if batch == 2:
            break
    assert workers() == 0


def test_closing_does_not_wait_for_steps_that_have_not_begun():
    made: list[int] = []

    def make(step):
        time.sleep(0.01)
        made.append(step)

    batches = prefetch(make, 0, 100, depth=50)
    next(batches)
    batches.close()
    assert len(made) < 25


def test_depth_is_checked_at_once():
    with pytest.raises(ValueError, match="depth must be 1 or more, not 0"):
        prefetch(lambda step: step, 0, 10, depth=0)
