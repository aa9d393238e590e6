"""Notices that a VM will be stopped, as Google's metadata server gives them."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from pathlib import Path

_HOST = "GCE_METADATA_HOST"  # of the server, where it is another; Google's libraries read it too
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_STOPS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_TIMEOUT_SECONDS = 5


class MaintenanceNotice:
    """Sends this process SIGTERM when a notice appears while its `with` block runs; elsewhere does nothing.

    A notice that stands there at the beginning is one that stopped the run before: the VM itself is not gone yet, and
    will send SIGTERM when it goes.

    Args:
      pause: seconds between looks.
    """

    def __init__(self, pause: float = 10.0):
        self._pause = pause
        self._ended = threading.Event()

    def __enter__(self) -> MaintenanceNotice:
        host = os.environ.get(_HOST) or ("metadata.google.internal" if _is_on_google() else "")
        if host:
            threading.Thread(target=self._watch, args=(host,), name="maintenance", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()

    def _watch(self, host: str) -> None:
        before = _notices(host)
        while not self._ended.wait(self._pause):
            if _notices(host) - before:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _is_on_google() -> bool:
    try:
        return "Google" in _PRODUCT.read_text()
    except OSError:
        return False


def _notices(host: str) -> set[str]:
    """Those that are given; none where the server does not answer."""
    found = set()
    for name, stops in _STOPS.items():
        url = f"http://{host}/computeMetadata/v1/instance/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                if answer.read().decode(errors="replace").strip() == stops:
                    found.add(name)
        except OSError:
            continue
    return found
