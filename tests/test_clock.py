"""Where the clock says that a run's time went."""

import pytest

from experiments.training import clock as clock_module
from experiments.training.clock import Clock


class Time:
    """Goes on only where it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(clock_module, "time", time)
    return time


def run(time, clock, *, steps, step, wait=0.0, looked=False, done=0):
    """Takes some steps in a window, and returns it."""

    def batches():
        for batch in range(steps):
            time.now += wait
            yield batch

    clock.begin(done)
    for _ in clock.batches(batches()):
        time.now += step
    return clock.end(done + steps, looked=looked)


def test_a_window_tells_steps_seconds_and_how_long_batches_were_waited_for(time):
    clock = Clock(lambda: False)
    assert run(time, clock, steps=10, step=1.0, wait=0.25, done=30) == (10, 12.5, 2.5, False)
    assert run(time, clock, steps=4, step=1.0) == (4, 4.0, 0.0, False)


def test_what_goes_before_a_window_is_not_in_it(time):
    clock = Clock(lambda: False)
    batches = clock.batches(iter("ab"))
    next(batches)
    time.now += 60.0  # compiling
    clock.begin(0)
    time.now += 2.0
    assert clock.end(1, looked=False).seconds == 2.0


def test_checkpoints_cost_what_the_loop_stands_still_and_what_steps_take_longer(time):
    is_writing = False
    clock = Clock(lambda: is_writing)
    run(time, clock, steps=10, step=1.0)
    with clock.standing():
        time.now += 3.0
    is_writing = True
    run(time, clock, steps=10, step=1.5)
    is_writing = False
    run(time, clock, steps=10, step=1.0)
    assert clock.checkpoint_wait == pytest.approx(3 / 38)
    assert clock.checkpoint_share == pytest.approx((3 + 5) / 38)


def test_a_look_at_tensors_is_no_slow_step(time):
    clock = Clock(lambda: True)
    clock.begin(0)
    time.now += 4.0
    clock.end(1, looked=True)
    assert clock.checkpoint_share == clock.checkpoint_wait == 0.0


def test_without_steps_there_are_no_shares(time):
    clock = Clock(lambda: False)
    with clock.standing():
        time.now += 1.0
    assert clock.checkpoint_wait is None and clock.checkpoint_share is None
