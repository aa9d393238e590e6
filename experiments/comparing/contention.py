"""How much of the machine other work took while a run went on."""

import os
import resource
import time

import psutil

_UNUSED = ("idle", "iowait")
_COUNTED_TWICE = ("guest", "guest_nice")  # in user and nice


class Contention:
    """Watches the processors from now on; what an accelerator does is not seen."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy(), _own()

    def others(self) -> float:
        """The share of all processors' time that went to others than this process and its children that ended."""
        used = (_busy() - self._busy) - (_own() - self._own)
        return max(0.0, used) / ((time.monotonic() - self._began) * (os.cpu_count() or 1))


def _busy() -> float:
    times = psutil.cpu_times()._asdict()
    return sum(seconds for name, seconds in times.items() if name not in (*_UNUSED, *_COUNTED_TWICE))


def _own() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
