"""The lock of a run that stands in a bucket: an object, `.lock`, that its holder writes anew every few seconds.

Nobody has to unlock the run of a process that died: who finds the object sees it change, and then the run is in use, or
sees it stay as it is for longer than a living holder would leave it, and then takes it over. No clock is compared with
another, so none has to be right. Every write asks for the generation that the writer saw last; so of two that would
take over one succeeds, and a holder that was only away (a machine suspended, a network cut) finds out with its next
write, which `check` makes before anything that counts is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable

from experiments.bucket import Bucket, BucketError, Overtaken
from experiments.runs.errors import RunError

LOCK = ".lock"
HEARTBEAT_SECONDS = 10.0
# Six heartbeats in a row that did not come through.
DEAD_SECONDS = 60.0


class Lease:
    """Held from `take` to `release`, or until another process took it over."""

    def __init__(self, bucket: Bucket, generation: int, content: bytes):
        self._bucket, self._generation, self._content = bucket, generation, content
        self._taken_over: RunError | None = None
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, bucket: Bucket, say: Callable[[str], None]) -> Lease:
        """Takes the lease, after `DEAD_SECONDS` if the last holder did not release it.

        Args:
          bucket: where the run stands.
          say: told that it has to be waited.

        Raises:
          RunError: a living process holds it.
          BucketError: the bucket cannot be reached.
        """
        content = json.dumps(
            {"process": os.getpid(), "host": platform.node(), "token": uuid.uuid4().hex}, indent=2
        ).encode()
        found = bucket.read(LOCK)
        if found is not None:
            say(f"waiting whether {_holder(found[0])} still uses {bucket.url}, for up to {DEAD_SECONDS:.0f} s")
        seen = time.monotonic()
        while found is not None and time.monotonic() - seen < DEAD_SECONDS:
            time.sleep(min(1.0, HEARTBEAT_SECONDS / 4))
            before, found = found, bucket.read(LOCK)
            if found is not None and found[1] != before[1]:
                raise _in_use(bucket, found[0])
        try:
            generation = _write(bucket, content, 0 if found is None else found[1])
        except Overtaken as error:
            raise _in_use(bucket, (bucket.read(LOCK) or (b"", 0))[0]) from error
        return cls(bucket, generation, content)

    def check(self) -> None:
        """Makes sure that this process still holds the lease.

        Raises:
          RunError: another took it over.
          BucketError: the bucket cannot be reached, so nobody knows.
        """
        with self._lock:
            if self._taken_over is None:
                try:
                    self._generation = _write(self._bucket, self._content, self._generation)
                except Overtaken:
                    holder = _holder((self._bucket.read(LOCK) or (b"", 0))[0])
                    self._taken_over = RunError(
                        f"--workdir={self._bucket.url} has been taken over by {holder}, which had heard nothing of this"
                        f" process for {DEAD_SECONDS:.0f} s; leave the run to it"
                    )
            if self._taken_over is not None:
                raise self._taken_over

    def release(self) -> None:
        """Gives the lease up, unless another process has it; where that fails, others wait `DEAD_SECONDS`."""
        self._released.set()
        self._thread.join()
        with self._lock, contextlib.suppress(BucketError):
            if self._taken_over is None:
                self._bucket.delete(LOCK, self._generation)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            # What is wrong is said by `check`, to who wants to write.
            with contextlib.suppress(BucketError, RunError):
                self.check()


def _write(bucket: Bucket, content: bytes, generation: int) -> int:
    """Writes the lease; a try whose answer was lost has written it, too, and is not mistaken for another holder."""
    try:
        return bucket.write(LOCK, content, generation)
    except Overtaken:
        found = bucket.read(LOCK)
        if found is None or found[0] != content:
            raise
        return found[1]


def _holder(content: bytes) -> str:
    try:
        lease = json.loads(content)
        return f"process {lease['process']} on {lease['host']}"
    except (ValueError, TypeError, KeyError):
        return "another process"


def _in_use(bucket: Bucket, content: bytes) -> RunError:
    return RunError(
        f"--workdir={bucket.url} is in use by {_holder(content)}; wait for it to end or give another --workdir"
    )
