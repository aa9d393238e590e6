"""metrics.jsonl: every step once, exact numbers, strict JSON, whatever the run went through."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from experiments.runs import MetricsWriter, RunError, read_metrics
from experiments.runs import events as events_module
from experiments.runs import metrics as metrics_module


def write(workdir, steps, resume_step=None):
    with MetricsWriter(workdir, resume_step) as metrics:
        for step in steps:
            metrics.write(step, {"loss": np.float32(1 / (step + 1))})


def lines(workdir):
    return (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def not_json(token):
    raise AssertionError(f"{token} is not JSON")


def test_values_read_back_exactly(tmp_path):
    loss = np.float32(2.4312434)
    values = {
        "loss": loss,
        "jax": jnp.float32(0.1),
        "bf16": ml_dtypes.bfloat16(0.3),
        "float": 0.1,
        "nonfinite_tensors": np.int32(0),
        "precision": "fp8",
        "skipped": None,
        "ok": True,
    }
    with MetricsWriter(tmp_path, None) as metrics:
        metrics.write(0, values)
    (record,) = read_metrics(tmp_path)
    assert np.float32(record["loss"]) == loss
    assert record["loss"] == float(loss)
    assert record == {
        "step": 0,
        "loss": float(loss),
        "jax": float(np.float32(0.1)),
        "bf16": float(ml_dtypes.bfloat16(0.3)),
        "float": 0.1,
        "nonfinite_tensors": 0,
        "precision": "fp8",
        "skipped": None,
        "ok": True,
    }


def test_what_is_not_finite_is_null_and_every_line_is_strict_json(tmp_path):
    with MetricsWriter(tmp_path, None) as metrics:
        for step, loss in enumerate((np.float32(np.nan), float("inf"), jnp.float32(-jnp.inf), 1.0)):
            metrics.write(step, {"loss": loss, "nonfinite_tensors": 3})
    records = [json.loads(line, parse_constant=not_json) for line in lines(tmp_path)]
    assert [record["loss"] for record in records] == [None, None, None, 1.0]
    assert all(record["nonfinite_tensors"] == 3 for record in records)


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, None) as metrics:
        for step in range(3):
            metrics.write(step, {})
            assert len(lines(tmp_path)) == step + 1
            assert lines(tmp_path)[-1] == b'{"step": %d}\n' % step


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    (whole := tmp_path / "whole").mkdir()
    write(whole, range(0, 101, 10))
    (broken := tmp_path / "broken").mkdir()
    write(broken, range(0, 71, 10))  # the last checkpoint was at step 50
    with open(broken / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 80, "lo')  # and then came kill -9
    write(broken, range(60, 81, 10), resume_step=50)
    write(broken, range(90, 101, 10), resume_step=80)
    assert lines(broken) == lines(whole)
    assert [record["step"] for record in read_metrics(broken)] == list(range(0, 101, 10))


def test_without_a_checkpoint_the_file_starts_over(tmp_path):
    write(tmp_path, [0, 10])
    write(tmp_path, [0])
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    write(tmp_path, [], resume_step=0)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]


def test_a_torn_line_is_never_kept(tmp_path):
    write(tmp_path, [1, 2])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    last = len(lines(tmp_path)[-1])
    for cut in range(1, last + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:-cut])
        assert [record["step"] for record in read_metrics(tmp_path)] == [1]
        write(tmp_path, [2], resume_step=1)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_a_damaged_line_that_is_needed_is_an_error_and_nothing_is_lost(tmp_path):
    write(tmp_path, [1, 2, 3])
    damaged = lines(tmp_path)
    damaged[1] = b'{"loss": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(damaged))
    for act in (lambda: read_metrics(tmp_path), lambda: MetricsWriter(tmp_path, 3)):
        with pytest.raises(RunError, match=r"line 2 of .*metrics.jsonl is damaged"):
            act()
    assert lines(tmp_path) == damaged


def test_a_step_cannot_be_logged_twice(tmp_path):
    with MetricsWriter(tmp_path, None) as metrics:
        metrics.write(5, {})
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step {step} comes after step 5"):
                metrics.write(step, {})
    with MetricsWriter(tmp_path, 5) as metrics, pytest.raises(ValueError, match="after step 5"):
        metrics.write(5, {})


def test_only_the_primary_process_writes(tmp_path):
    with MetricsWriter(tmp_path, None, primary=False) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.sync()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_the_torn_line_goes_at_the_next_start(tmp_path, monkeypatch):
    metrics = MetricsWriter(tmp_path, None)
    metrics.write(1, {"loss": 1.0})
    file = metrics._file

    class Full:
        def write(self, data):
            return file.write(data[:7])

        def close(self):
            file.close()

    monkeypatch.setattr(metrics, "_file", Full())
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be written \(no space left"):
        metrics.write(2, {"loss": 1.0})
    metrics.close()
    assert lines(tmp_path)[-1] == b'{"step"'
    write(tmp_path, [2], resume_step=1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_events_that_no_longer_fit_at_the_end_are_told_in_a_sentence(tmp_path, monkeypatch):
    metrics = MetricsWriter(tmp_path, None)

    close = metrics._events.close

    def full():
        close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics._events, "close", full)
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be written \(no space left"):
        metrics.close()
    metrics.close()


def test_there_may_be_no_file(tmp_path):
    with pytest.raises(RunError, match=r"metrics.jsonl does not exist"):
        read_metrics(tmp_path)
    with MetricsWriter(tmp_path, 7) as metrics:
        metrics.write(8, {})
    assert metrics_module.read_metrics(tmp_path) == [{"step": 8}]


def events(path):
    """The events in a TensorBoard file: length, CRC of it, data, CRC of that."""
    data, found = path.read_bytes(), []
    while data:
        header, check = data[:8], data[8:12]
        assert struct.unpack("<I", check)[0] == masked_crc32c(header)
        (length,) = struct.unpack("<Q", header)
        body, check = data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<I", check)[0] == masked_crc32c(body)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def test_tensorboard_sees_the_same_numbers_and_forgets_what_is_computed_again(tmp_path):
    with MetricsWriter(tmp_path, None) as metrics:
        metrics.write(10, {"loss": np.float32(2.5), "precision": "fp8", "eval_loss": np.nan})
        metrics.write(20, {"loss": 1.5, "tokens": 4096})
    write(tmp_path, [20], resume_step=10)
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert first.name.startswith("events.out.tfevents.")
    version, start, *scalars = events(first)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 0)
    assert [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in scalars] == [
        (10, {"loss": 2.5}),
        (20, {"loss": 1.5, "tokens": 4096.0}),
    ]
    _, start, again = events(second)
    assert (start.session_log.status, start.step) == (SessionLog.START, 11)
    assert again.step == 20
    assert again.wall_time > 0


def test_tensorboard_takes_the_starts_in_their_order_though_the_clock_is_set_back(tmp_path, monkeypatch):
    for now, step in ((2e9, 1), (1e9, 2), (5, 3), (3e9, 4)):
        monkeypatch.setattr(events_module.time, "time", lambda now=now: now)
        write(tmp_path, [step], resume_step=step - 1)
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert [event.step for path in files for event in events(path) if event.HasField("summary")] == [1, 2, 3, 4]


def test_nested_values_go_to_a_file_of_their_own_and_to_tensorboard_by_their_paths(tmp_path):
    dots = {"mlp/up": {"x": {"amax": [1.5, None], "binades": [[1, 2], [3, 4]]}}}
    with MetricsWriter(tmp_path, None, name="telemetry.jsonl") as telemetry:
        telemetry.write(3, {"dots": dots, "formats": {"mlp/up": {"x": "float8_e4m3fn"}}, "first_binade": -24})
    assert read_metrics(tmp_path, "telemetry.jsonl")[0]["dots"] == dots
    assert not (tmp_path / "metrics.jsonl").exists()
    (file,) = (tmp_path / "tensorboard").iterdir()
    (seen,) = (e for e in events(file) if e.HasField("summary"))
    assert {v.tag: v.simple_value for v in seen.summary.value} == {"dots/mlp/up/x/amax/0": 1.5, "first_binade": -24.0}
