"""Keeps Orbax from telling of a failed save in tracebacks, of which there is one for each array.

The first write that fails ends Orbax's event loop. The others report to one that is gone, or to nobody.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def silence_orbax() -> None:
    """`Checkpoints` says it better; everything else that goes wrong is told as before."""
    for name, is_told in (("absl", _from_elsewhere), ("asyncio", _awaited)):
        logger = logging.getLogger(name)
        if is_told not in logger.filters:
            logger.addFilter(is_told)
    hook = sys.unraisablehook
    if not (isinstance(hook, functools.partial) and hook.func is _tell):
        sys.unraisablehook = functools.partial(_tell, hook)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _awaited(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _tell(former: Callable[[Any], None], found: Any) -> None:
    if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        former(found)
