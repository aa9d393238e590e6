"""The bar, the plain lines, and stopping on a signal."""

import io
import os
import signal

import pytest

from experiments.runs import Progress, StopSignal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_when_the_output_is_not_a_terminal():
    out = io.StringIO()
    with Progress(300, 0, 2048, out=out) as progress:
        for step in range(1, 51):
            progress.advance(step)
        progress.log(50, 31204.4, loss=2.43124)
        progress.note("checkpoint 50 saved")
        progress.log(300, 10_000.0, loss=1.5, eval_loss=float("nan"))
    assert out.getvalue() == (
        "step 50/300  loss 2.4312  31,204 tok/s  0:00:16 left\n"
        "checkpoint 50 saved\n"
        "step 300/300  loss 1.5000  eval_loss nan  10,000 tok/s  0:00:00 left\n"
    )


def test_the_time_left_needs_a_speed():
    out = io.StringIO()
    progress = Progress(100_000, 40_000, 1_000_000, out=out)
    progress.log(50_000, 1e5)
    progress.log(50_001, 0.0)
    assert out.getvalue().splitlines() == [
        "step 50000/100000  100,000 tok/s  5 days, 18:53:20 left",
        "step 50001/100000  0 tok/s  ? left",
    ]


def test_a_bar_on_a_terminal():
    out = Terminal()
    with Progress(300, 100, 2048, out=out) as progress:
        progress.log(150, 31204.4, loss=2.43124)
        progress.note("checkpoint 150 saved")
    frames = out.getvalue().split("\r")
    assert any(frame.startswith("step 100/300 |") for frame in frames)
    assert any(
        frame.startswith("step 150/300 |") and frame.rstrip().endswith("| loss 2.4312  31,204 tok/s  0:00:10 left")
        for frame in frames
    )
    assert "checkpoint 150 saved\n" in out.getvalue()
    assert out.getvalue().endswith("\n")


def test_only_the_primary_process_shows_anything():
    out = Terminal()
    with Progress(300, 0, 2048, out=out, primary=False) as progress:
        progress.advance(1)
        progress.log(1, 1.0, loss=1.0)
        progress.note("x")
    assert out.getvalue() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_loop_to_stop(number):
    former = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # the scheduler repeats itself
        assert stop.requested == number.name
    assert signal.getsignal(number) is former


def test_a_second_interrupt_does_not_wait():
    former = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) is former
