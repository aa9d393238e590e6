"""Python imports this first where it is on PYTHONPATH: its clock jumps by DRILL_YEARS, one after another.

What is not written in Python (the monotonic clock, the kernel's times of files) goes on as it is.
"""

import datetime
import os
import time
from typing import Any, TypeAlias

_NANOSECONDS_A_YEAR = 31_556_952 * 10**9
_EACH = 5 * 10**8
_YEARS = [int(years) for years in os.environ["DRILL_YEARS"].split(",")]
_now, _started = time.time_ns, time.monotonic_ns()
_datetime: TypeAlias = datetime.datetime


def _jumping_ns() -> int:
    turn = (time.monotonic_ns() - _started) // _EACH
    return _now() + _YEARS[turn % len(_YEARS)] * _NANOSECONDS_A_YEAR


class _Real(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _datetime)


class _Datetime(_datetime, metaclass=_Real):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return _datetime.fromtimestamp(_jumping_ns() / 1e9, tz)


time.time_ns = _jumping_ns
time.time = lambda: _jumping_ns() / 1e9
datetime.datetime = _Datetime  # type: ignore[misc]
