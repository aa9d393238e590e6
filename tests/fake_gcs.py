"""As much of the JSON API of Google Cloud Storage as TensorStore, gcsfs and Google's client call, on loopback.

Objects lie in `FakeGcs.objects`, where a test may look at them and damage them. Like the real one it lists what was
written at once, and it refuses a write or a deletion whose `ifGenerationMatch` is not the generation of the object.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import google_crc32c

BUCKET = "bucket"


@dataclass
class Object:
    data: bytes
    generation: int
    updated: str = field(default_factory=lambda: f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}")


class FakeGcs:
    """A server of one bucket, `BUCKET`, until the process ends.

    Attributes:
      objects: name to object.
      requests: method and path of everything asked for.
      refuses: an HTTP status that every request gets instead of its answer; 0 for none.
      environment: what makes clients use it.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.requests: list[str] = []
        self.refuses = 0
        self.lock = threading.RLock()
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.counter = itertools.count(1)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": self}))
        self._url = f"http://127.0.0.1:{self._server.server_port}"
        # What the three clients read.
        self.environment = {
            "STORAGE_EMULATOR_HOST": self._url,
            "TENSORSTORE_GCS_HTTP_URL": self._url,
            # gcsfs asks the real service, by gRPC, what kind of bucket it is.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        """Forgets everything."""
        with self.lock:
            self.objects.clear()
            self.requests.clear()
            self.refuses = 0

    def names(self, prefix: str = "") -> list[str]:
        """Of the objects with a prefix, without it."""
        with self.lock:
            return sorted(name.removeprefix(prefix) for name in self.objects if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        return self.objects[name].data

    def put(self, name: str, data: bytes) -> Object:
        with self.lock:
            self.objects[name] = Object(bytes(data), next(self.counter))
            return self.objects[name]


class _Answer(Exception):
    def __init__(self, status: int, body: bytes = b"", **headers: str):
        self.status, self.body, self.headers = status, body, headers


class _Handler(BaseHTTPRequestHandler):
    gcs: FakeGcs
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length) if length else self._chunks()
        path, _, query = self.path.partition("?")
        self._query = dict(urllib.parse.parse_qsl(query))
        words = [urllib.parse.unquote(word) for word in path.strip("/").split("/")]
        with self.gcs.lock:
            self.gcs.requests.append(f"{self.command} {path}")
            try:
                if self.gcs.refuses:
                    raise _Answer(self.gcs.refuses, _error(self.gcs.refuses))
                raise self._route(words)
            except _Answer as answer:
                found = answer
        with contextlib.suppress(ConnectionError):
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(found.body)))
            self.end_headers()
            self.wfile.write(found.body)

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, words: list[str]) -> _Answer:
        match (self.command, *words):
            case ("GET", "storage", "v1", "b", bucket):
                self._in(bucket)
                return _json({"kind": "storage#bucket", "name": bucket})
            case ("GET", "storage", "v1", "b", bucket, "o"):
                self._in(bucket)
                return self._list()
            case ("GET", *_, "v1", "b", bucket, "o", name):
                self._in(bucket)
                return self._read(name)
            case ("DELETE", "storage", "v1", "b", bucket, "o", name):
                self._in(bucket)
                self._existing(name)
                self._check(name, self._query)
                del self.gcs.objects[name]
                return _Answer(204)
            case ("POST", "storage", "v1", "b", bucket, "o", source, "rewriteTo", "b", _, "o", name):
                self._in(bucket)
                self._check(name, self._query)
                written = self.gcs.put(name, self._existing(source).data)
                size = str(len(written.data))
                progress = {"done": True, "totalBytesRewritten": size, "objectSize": size}
                return _json(progress | {"resource": _resource(name, written)})
            case ("POST", "upload", "storage", "v1", "b", bucket, "o"):
                self._in(bucket)
                # gcsfs sends the parts with POST, too.
                return self._continue() if "upload_id" in self._query else self._upload()
            case ("PUT", "upload", "storage", "v1", "b", _, "o"):
                return self._continue()
        raise _Answer(501, _error(501, f"{self.command} {self.path}"))

    def _in(self, bucket: str) -> None:
        if bucket != BUCKET:
            raise _Answer(404, _error(404, "The specified bucket does not exist."))

    def _existing(self, name: str) -> Object:
        if name not in self.gcs.objects:
            raise _Answer(404, _error(404, f"No such object: {name}"))
        return self.gcs.objects[name]

    def _check(self, name: str, query: dict[str, str]) -> None:
        found = self.gcs.objects.get(name)
        generation = 0 if found is None else found.generation
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise _Answer(412, _error(412, "At least one of the pre-conditions you specified did not hold."))
        if int(query.get("ifGenerationNotMatch", -1)) == generation:
            raise _Answer(304)

    def _read(self, name: str) -> _Answer:
        found = self._existing(name)
        self._check(name, self._query)
        if self._query.get("alt") != "media":
            return _json(_resource(name, found))
        headers = {"X_Goog_Generation": str(found.generation), "Content_Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        size = len(found.data)
        if not asked:
            return _Answer(200, found.data, **headers)
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise _Answer(416, b"", Content_Range=f"bytes */{size}")
        return _Answer(206, found.data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{size}", **headers)

    def _list(self) -> _Answer:
        prefix, delimiter = self._query.get("prefix", ""), self._query.get("delimiter", "")
        # Far below the real 1,000, so that pages are turned.
        most = min(int(self._query.get("maxResults", 7)), 7)
        entries: dict[str, Object | None] = {}
        for name in self.gcs.names():
            if not name.startswith(prefix):
                continue
            if name < self._query.get("startOffset", "") or name >= self._query.get("endOffset", "\U0010ffff"):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                entries[prefix + head + delimiter] = None
            else:
                entries[name] = self.gcs.objects[name]
        rest = sorted(name for name in entries if name > self._query.get("pageToken", ""))
        page, more = rest[:most], rest[most:]
        objects = [(name, entries[name]) for name in page]
        answer: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [_resource(name, found) for name, found in objects if found is not None],
            "prefixes": [name for name, found in objects if found is None],
        }
        return _json(answer | ({"nextPageToken": page[-1]} if more else {}))

    def _upload(self) -> _Answer:
        kind = self._query["uploadType"]
        if kind == "media":
            return self._written(self._query["name"], self._query, self._body)
        if kind == "multipart":
            about, content = _parts(self.headers["Content-Type"], self._body)
            return self._written(json.loads(about)["name"], self._query, content)
        name = self._query.get("name") or json.loads(self._body)["name"]
        upload = str(next(self.gcs.counter))
        self.gcs.uploads[upload] = name, self._query, bytearray()
        location = (
            f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={upload}"
        )
        return _Answer(200, Location=location)

    def _continue(self) -> _Answer:
        name, query, data = self.gcs.uploads[self._query["upload_id"]]
        _, total = self.headers["Content-Range"].removeprefix("bytes ").split("/")
        data += self._body
        if total == "*" or len(data) < int(total):
            return _Answer(308, Range=f"bytes=0-{len(data) - 1}")
        return self._written(name, query, data)

    def _written(self, name: str, query: dict[str, str], data: bytes) -> _Answer:
        self._check(name, query)
        return _json(_resource(name, self.gcs.put(name, data)))


def _parts(content_type: str, body: bytes) -> tuple[bytes, bytes]:
    """What the two parts of a multipart body hold, byte for byte."""
    mark = b"--" + re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    line = b"\r\n" if body.startswith(mark + b"\r\n") else b"\n"
    first, second = body.index(mark, len(mark)), body.rindex(mark)
    about, content = body[:first], body[first:second]
    return tuple(part.split(2 * line, 1)[1].removesuffix(line) for part in (about, content))


def _resource(name: str, found: Object) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "id": f"{BUCKET}/{name}/{found.generation}",
        "name": name,
        "bucket": BUCKET,
        "generation": str(found.generation),
        "metageneration": "1",
        "size": str(len(found.data)),
        "md5Hash": base64.b64encode(hashlib.md5(found.data).digest()).decode(),
        "crc32c": base64.b64encode(google_crc32c.Checksum(found.data).digest()).decode(),
        "timeCreated": found.updated,
        "updated": found.updated,
    }


def _json(value: Any) -> _Answer:
    return _Answer(200, json.dumps(value).encode(), Content_Type="application/json")


def _error(status: int, message: str = "refused") -> bytes:
    return json.dumps({"error": {"code": status, "message": message}}).encode()


@functools.cache
def shared() -> FakeGcs:
    """One server for all tests of a process, whose clients read once where it is."""
    gcs = FakeGcs()
    gcs.start()
    os.environ.update(gcs.environment)
    return gcs
