"""Objects below one place in a bucket, `gs://BUCKET/FOLDER`: what a run and its readers need of Google Cloud Storage.

An object is there whole or not at all, is listed as soon as it is written, and has a generation, another one with every
write, which a write can ask for. Nothing is renamed: what renames are for on a disk is done with conditional writes.

Needs the extra `gcs`, which is imported when a bucket is first asked for. JAX is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 23
# Seconds to connect and to wait for an answer, and for all tries of one request together.
_TIMEOUT = (10.0, 60.0)
_PATIENCE = 120.0
_FIRST_PATIENCE = 10.0
_LEFT_OUT = {"checkpoints", "tensorboard", "profile", ".lock"}


class BucketError(OSError):
    """A bucket cannot be used as asked; its text is the reason, a part of a sentence."""


class Overtaken(BucketError):
    """An object is not of the generation that a write or a deletion asked for."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it names a place in object storage, of any kind, and no directory."""
    return re.match(r"[a-z0-9]+://", os.fspath(path)) is not None


class Bucket:
    """The objects whose names begin with one prefix; names are given and returned without it.

    Every method raises BucketError where the bucket cannot be reached or refuses.

    Attributes:
      url: of the place, without a slash at its end.
    """

    def __init__(self, url: str, handle: Any, prefix: str, patience: float):
        self.url = url
        self._bucket, self._prefix = handle, prefix
        from google.cloud.storage.retry import DEFAULT_RETRY

        self._how = {"timeout": _TIMEOUT, "retry": DEFAULT_RETRY.with_timeout(patience)}

    @classmethod
    def connect(cls, url: str | os.PathLike[str]) -> Bucket:
        """Reaches the bucket, in seconds.

        Raises:
          BucketError: the extra `gcs` is not installed, the URL is not of a folder in a bucket, there are no
            credentials, or the bucket is not there.
        """
        text = os.fspath(url).rstrip("/")
        found = re.fullmatch(r"gs://([^/]+)/(.+)", text)
        if not found:
            raise BucketError("of object storage only gs://BUCKET/FOLDER is known")
        try:
            import fsspec.config
            import gcsfs  # noqa: F401  (Orbax writes through it)
            from google.cloud import storage
        except ImportError as error:
            raise BucketError("gs:// needs the extra gcs: pip install -e '.[gcs]'") from error
        # Else Orbax would be told of objects that are no longer there.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        with _reasons(), contextlib.ExitStack() as undo:
            client = undo.enter_context(contextlib.closing(storage.Client()))
            handle = client.bucket(found[1])
            cls(text, handle, f"{found[2]}/", _FIRST_PATIENCE).folders()
            undo.pop_all()
        return cls(text, handle, f"{found[2]}/", _PATIENCE)

    def close(self) -> None:
        """Ends its connections; a method called after it would make new ones."""
        self._bucket.client.close()

    def sizes(self, below: str = "") -> dict[str, int]:
        """Name, without `below`, to size in bytes of every object whose name begins with it."""
        start = self._prefix + below
        with _reasons():
            found = self._bucket.client.list_blobs(self._bucket, prefix=start, **self._how)
            return {blob.name.removeprefix(start): blob.size for blob in found}

    def folders(self, below: str = "") -> list[str]:
        """What lies between `below` and the next slash, in the names of the objects that have one."""
        start = self._prefix + below
        with _reasons():
            pages = self._bucket.client.list_blobs(self._bucket, prefix=start, delimiter="/", **self._how)
            list(pages)  # the prefixes are known when all pages have been read
        return sorted(prefix.removeprefix(start).rstrip("/") for prefix in pages.prefixes)

    def read(self, name: str) -> tuple[bytes, int] | None:
        """What an object holds and its generation; None if there is none."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with _reasons():
            while (blob := self._bucket.get_blob(self._prefix + name, **self._how)) is not None:
                # Not there, or another one, when it has just been replaced.
                with contextlib.suppress(NotFound, PreconditionFailed):
                    content = blob.download_as_bytes(if_generation_match=blob.generation, **self._how)
                    return content, blob.generation
        return None

    def write(self, name: str, content: bytes, generation: int | None = None) -> int:
        """Replaces an object; returns its generation.

        Args:
          name: of the object.
          content: all of it.
          generation: that it must have, 0 for an object that must not be there; None replaces any.

        Raises:
          Overtaken: it has another.
        """
        blob = self._blob(name)
        with _reasons():
            blob.upload_from_string(content, if_generation_match=generation, **self._how)
        return blob.generation

    def upload(self, name: str, file: Path) -> None:
        """Replaces an object by what a file holds now; the file may grow meanwhile."""
        with open(file, "rb") as stream, _reasons():
            self._blob(name).upload_from_file(stream, size=os.fstat(stream.fileno()).st_size, **self._how)

    def download(self, name: str, file: Path) -> None:
        """Writes what an object holds into a file, whose parents are created."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with _reasons():
            self._blob(name).download_to_filename(str(file), **self._how)

    def sha256(self, name: str) -> str:
        """Of what an object holds, read piece by piece."""
        found = hashlib.sha256()
        with _reasons(), self._blob(name).open("rb", chunk_size=_CHUNK, **self._how) as stream:
            while piece := stream.read(_CHUNK):
                found.update(piece)
        return found.hexdigest()

    def copy(self, source: str, name: str) -> None:
        """Copies an object, within the store."""
        target, token = self._blob(name), ""
        with _reasons():
            while token is not None:
                token, *_ = target.rewrite(self._blob(source), token=token or None, **self._how)

    def delete(self, name: str, generation: int | None = None) -> None:
        """Deletes an object, if it is there.

        Raises:
          Overtaken: it has another generation than the one given.
        """
        from google.api_core.exceptions import NotFound

        with _reasons(), contextlib.suppress(NotFound):
            self._blob(name).delete(if_generation_match=generation, **self._how)

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)


@contextlib.contextmanager
def fetched(pattern: str) -> Iterator[str]:
    """A path or glob as it is; of a place in a bucket a temporary directory that its runs have been copied to.

    What readers of runs have no use for, checkpoints first of all, is left in the bucket.

    Raises:
      BucketError: the bucket cannot be read, or holds nothing there; one sentence.
    """
    if not is_url(pattern):
        yield pattern
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, pattern.rstrip("/").rsplit("/", 1)[1])
        try:
            with contextlib.closing(Bucket.connect(pattern)) as bucket:
                names = [name for name in bucket.sizes() if _LEFT_OUT.isdisjoint(name.split("/"))]
                for name in names:
                    bucket.download(name, folder / name)
        except BucketError as error:
            raise BucketError(f"{pattern} cannot be read: {error}.") from error
        if not names:
            raise BucketError(f"{pattern} holds nothing: give a folder of runs; globs are for directories.")
        yield str(folder)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """What the libraries say of a request, as a reason in one line."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    try:
        yield
    except exceptions.PreconditionFailed as error:
        raise Overtaken("another process has written it meanwhile") from error
    except exceptions.RetryError as error:
        raise BucketError(f"the bucket cannot be reached: {_line(error.cause)}") from error
    except BucketError:
        raise
    except (exceptions.GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse, OSError) as error:
        raise BucketError(_line(error)) from error


def _line(error: Any) -> str:
    try:
        message = error.response.json()["error"]["message"]
    except (AttributeError, ValueError, TypeError, KeyError):
        message = str(error) or type(error).__name__
    text = " ".join(str(message).split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]}…"
