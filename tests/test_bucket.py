"""Buckets: what a run needs of object storage, the lock of a run there, and its files."""

import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

import fake_gcs
import pytest

from experiments import bucket as bucket_module
from experiments.bucket import Bucket, BucketError, Overtaken, fetched
from experiments.runs import RunError, lease
from experiments.runs.lease import LOCK, Lease
from experiments.runs.mirror import Mirror

URL = f"gs://{fake_gcs.BUCKET}/some/run"


@pytest.fixture
def gcs():
    server = fake_gcs.shared()
    server.clear()
    return server


@pytest.fixture
def bucket(gcs):
    with contextlib.closing(Bucket.connect(f"{URL}/")) as connected:
        yield connected


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 60.0)


@pytest.fixture
def impatient(quick, monkeypatch):
    monkeypatch.setattr(lease, "DEAD_SECONDS", 0.5)


def unsaid(text):
    raise AssertionError(text)


def test_objects_are_written_read_listed_copied_and_deleted(gcs, bucket, tmp_path):
    assert bucket.url == URL and bucket.read("a") is None and bucket.sizes() == {}
    content = b"\r\n--x\r\n\0\xff\n"
    generation = bucket.write("a", content)
    assert gcs.read("some/run/a") == content and bucket.read("a") == (content, generation)
    for index in range(20):  # more than a page
        bucket.write(f"deep/{index}/é b", bytes(index))
    gcs.put("some/run-2/a", b"another run's")
    assert bucket.sizes() == {"a": len(content), **{f"deep/{index}/é b": index for index in range(20)}}
    assert bucket.sizes("deep/3/") == {"é b": 3}
    assert bucket.folders() == ["deep"] and bucket.folders("deep/") == sorted(map(str, range(20)))
    bucket.copy("a", "b")
    assert gcs.read("some/run/b") == content
    for _ in range(2):
        bucket.delete("b")
    assert bucket.read("b") is None
    large = bytes(range(256)) * 50_000  # 12.8 MB: in parts
    (tmp_path / "large").write_bytes(large)
    bucket.upload("large", tmp_path / "large")
    assert gcs.read("some/run/large") == large
    assert bucket.sha256("large") == hashlib.sha256(large).hexdigest()
    bucket.download("large", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == large


def test_a_write_can_ask_for_the_generation(gcs, bucket):
    first = bucket.write("a", b"1", 0)
    with pytest.raises(Overtaken):
        bucket.write("a", b"2", 0)
    second = bucket.write("a", b"2", first)
    with pytest.raises(Overtaken):
        bucket.delete("a", first)
    assert gcs.read("some/run/a") == b"2"
    bucket.delete("a", second)
    assert gcs.names() == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/run", "of object storage only gs://BUCKET/FOLDER is known"),
        ("gs://bucket", "of object storage only gs://BUCKET/FOLDER is known"),
        ("gs://absent/run", "The specified bucket does not exist"),
    ],
)
def test_a_place_that_cannot_be_used_is_told_in_one_line(gcs, url, reason):
    with pytest.raises(BucketError, match=reason) as info:
        Bucket.connect(url)
    assert "\n" not in str(info.value)


def test_a_bucket_that_is_not_reached_or_refuses_is_told_within_seconds(gcs, monkeypatch):
    monkeypatch.setattr(bucket_module, "_FIRST_PATIENCE", 0.5)
    gcs.refuses = 403
    with pytest.raises(BucketError, match="refused"):
        Bucket.connect(URL)
    gcs.refuses = 503
    with pytest.raises(BucketError, match="cannot be reached"):
        Bucket.connect(URL)
    gcs.refuses = 0
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with pytest.raises(BucketError, match="cannot be reached"):
        Bucket.connect(URL)


def test_without_the_extra_the_error_names_it(gcs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(BucketError, match=r"needs the extra gcs: pip install"):
        Bucket.connect(URL)


def test_a_lease_keeps_others_out_until_it_is_released(gcs, bucket, quick):
    held = Lease.take(bucket, unsaid)
    with pytest.raises(RunError, match=rf"--workdir={URL} is in use by process \d+ on .*; wait for it"):
        Lease.take(bucket, lambda text: None)
    held.check()
    held.release()
    assert gcs.names() == []
    Lease.take(bucket, unsaid).release()


def test_the_lease_of_a_dead_run_is_taken_over(gcs, bucket, impatient):
    gcs.put(f"some/run/{LOCK}", json.dumps({"process": 7, "host": "worker-0", "token": "x"}).encode())
    said = []
    started = time.monotonic()
    held = Lease.take(bucket, said.append)
    assert time.monotonic() - started >= 0.5
    assert said == [f"waiting whether process 7 on worker-0 still uses {URL}, for up to 0 s"]
    held.check()
    held.release()


def test_who_was_away_for_too_long_is_told_that_another_has_the_run(gcs, bucket, impatient, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 3600.0)  # suspended
    away = Lease.take(bucket, unsaid)
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    held = Lease.take(bucket, lambda text: None)
    before = gcs.read(f"some/run/{LOCK}")
    for _ in range(2):
        with pytest.raises(RunError, match=rf"--workdir={URL} has been taken over by process \d+ on "):
            away.check()
    away.release()
    assert gcs.read(f"some/run/{LOCK}") == before  # not what is another's
    held.check()
    held.release()


def test_a_write_whose_answer_was_lost_is_not_another_holder(gcs, bucket, quick):
    held = Lease.take(bucket, unsaid)
    gcs.put(f"some/run/{LOCK}", gcs.read(f"some/run/{LOCK}"))
    held.check()
    held.release()
    assert gcs.names() == []


def test_heartbeats_go_on_when_the_bucket_was_away(gcs, bucket, quick):
    held = Lease.take(bucket, unsaid)
    gcs.refuses = 403
    time.sleep(0.2)
    gcs.refuses = 0
    seen = bucket.read(LOCK)[1]
    deadline = time.monotonic() + 30
    while bucket.read(LOCK)[1] == seen:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    held.release()


def test_a_mirror_copies_what_has_changed_and_deletes_what_is_gone(gcs):
    mirror = Mirror(Bucket.connect(URL))
    try:
        (mirror.folder / "tensorboard").mkdir()
        for name, content in (("metrics.jsonl", b"1\n"), ("diverged.json", b"{}"), ("tensorboard/events", b"e")):
            (mirror.folder / name).write_bytes(content)
        (mirror.folder / ".config.json.tmp").write_bytes(b"{")
        mirror.push()
        assert gcs.names("some/run/") == ["diverged.json", "metrics.jsonl", "tensorboard/events"]
        with open(mirror.folder / "metrics.jsonl", "ab") as file:
            file.write(b"2\n")
        (mirror.folder / "diverged.json").unlink()
        gcs.requests.clear()
        mirror.push()
        assert gcs.names("some/run/") == ["metrics.jsonl", "tensorboard/events"]
        assert gcs.read("some/run/metrics.jsonl") == b"1\n2\n"
        assert sum(line.startswith(("POST", "PUT")) for line in gcs.requests) == 1
    finally:
        mirror.close()
    assert not mirror.folder.exists()
    gcs.put("some/run/checkpoints/1/state/x", b"large")
    gcs.put(f"some/run/{LOCK}", b"{}")
    again = Mirror(Bucket.connect(URL))
    try:
        again.pull()
        assert [path.name for path in again.folder.iterdir()] == ["metrics.jsonl"]
        gcs.requests.clear()
        again.push()
        assert gcs.requests == []
        assert gcs.names("some/run/tensorboard/") == ["events"]
    finally:
        again.close()


def test_readers_get_a_copy_without_what_they_do_not_read(gcs, tmp_path):
    for name in ("config.json", "checkpoints/1/state/x", "tensorboard/e", ".lock"):
        gcs.put(f"some/run/{name}", b"{}")
    with fetched(f"gs://{fake_gcs.BUCKET}/some") as folder:
        assert folder.endswith("/some")
        assert [str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()] == ["run/config.json"]
    assert not Path(folder).exists()
    with fetched(str(tmp_path)) as folder:
        assert folder == str(tmp_path)
    with pytest.raises(BucketError, match="holds nothing"), fetched(f"gs://{fake_gcs.BUCKET}/som*"):
        pass
