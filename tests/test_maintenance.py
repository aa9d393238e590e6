"""Notices of a metadata server that this VM will be stopped."""

import http.server
import signal
import threading
import time

import pytest

from experiments.runs.maintenance import MaintenanceNotice


@pytest.fixture
def server(monkeypatch):
    """The answers of a server, by the last part of the address; its requests are counted in "asked"."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE", "asked": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            assert folder == "/computeMetadata/v1/instance" and self.headers["Metadata-Flavor"] == "Google"
            answers["asked"] += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[name].encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{listening.server_port}")
        yield answers
        listening.shutdown()
        thread.join()


@pytest.fixture
def told():
    """The signals that came."""
    found = []
    former = signal.signal(signal.SIGTERM, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGTERM, former)


def asked_again(server):
    goal, limit = server["asked"] + 4, time.monotonic() + 30
    while server["asked"] < goal and time.monotonic() < limit:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "notice", "stops"),
    [
        ("preempted", "TRUE", True),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", True),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", False),
    ],
)
def test_a_notice_is_handed_on_as_sigterm(server, told, name, notice, stops):
    with MaintenanceNotice(pause=0.01):
        asked_again(server)
        assert not told
        server[name] = notice
        limit = time.monotonic() + (30 if stops else 0.2)
        while not told and time.monotonic() < limit:
            time.sleep(0.01)
    assert told == [signal.SIGTERM] * stops


def test_a_notice_that_stood_there_before_is_none(server, told):
    server["preempted"] = "TRUE"
    with MaintenanceNotice(pause=0.01):
        asked_again(server)
    assert not told


def test_a_server_that_is_not_there_stops_nothing(monkeypatch, told):
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with MaintenanceNotice(pause=0.01):
        time.sleep(0.1)
    assert not told
