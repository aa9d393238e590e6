"""`config.json`: every resolved flag and recipe of a run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from experiments.bucket import Bucket, is_url
from experiments.runs.errors import RunError
from experiments.runs.files import read_json

CONFIG = "config.json"
_DIFFERENCES_SHOWN = 5
_UNSET = "unset"
_DATA = "data_sha256."


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration in a stored `config.json`, for `--config=RUN/config.json`.

    Raises:
      RunError: the file is absent, a directory, or not the configuration of a run.
    """
    if is_url(path):
        return _config_in_bucket(os.fspath(path))
    file = Path(path).expanduser()
    if file.is_dir():
        raise RunError(f"--config={path} is a directory; give --config={file / CONFIG}")
    if not file.exists():
        raise RunError(f"--config={path} does not exist; give the {CONFIG} of a run")
    try:
        config = read_json(file)
    except RunError as error:
        raise RunError(f"--config={path}: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"--config={path} does not hold flags; give the {CONFIG} of a run")
    return config


def config_differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], may_change: Collection[str] = ()
) -> dict[str, tuple[str, str]]:
    """The flags on which two configurations differ: name to (stored, wanted) as text.

    Nested mappings are compared entry by entry under dotted names. A key that one side lacks counts
    as null there, and both show as "unset": a flag that is newer than the run does not part them.
    """
    old, new = _flat(stored), _flat(wanted)
    return {
        key: (_show(old.get(key)), _show(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if key.split(".")[0] not in may_change and old.get(key) != new.get(key)
    }


def refuse_other_config(place: str, stored: Any, wanted: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Refuses what a run directory holds unless it is the configuration that is wanted.

    Args:
      place: of the run, for the error.
      stored: what its config.json holds.
      wanted: this start's configuration.
      may_change: the keys that may differ.

    Raises:
      RunError: another run stands there.
    """
    if not isinstance(stored, dict):
        raise RunError(f"{place}/{CONFIG} does not hold flags; use another --workdir")
    differences = config_differences(stored, wanted, may_change)
    if not differences:
        return
    if all(key.startswith(_DATA) for key in differences):
        changes = [_change(key.removeprefix(_DATA), *pair) for key, pair in differences.items()]
        hidden = len(changes) - _DIFFERENCES_SHOWN
        listed = ", ".join(changes[:_DIFFERENCES_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
        raise RunError(
            f"--workdir={place} holds a run on other data ({listed}); restore the data, or use another --workdir"
        )
    shown = list(differences.items())[:_DIFFERENCES_SHOWN]
    listed = ", ".join(f"--{key}={old} (here {new})" for key, (old, new) in shown)
    hidden = len(differences) - len(shown)
    more = f" and {hidden} more that differ" if hidden else ""
    raise RunError(f"--workdir={place} holds a run with {listed}{more}; use another --workdir or repeat the flags")


def _change(name: str, old: str, new: str) -> str:
    if new == _UNSET:
        return f"{name} is gone"
    return f"{name} is new" if old == _UNSET else f"{name} has changed"


def _config_in_bucket(url: str) -> dict[str, Any]:
    folder, _, name = url.rpartition("/")
    try:
        with contextlib.closing(Bucket.connect(folder)) as bucket:
            found = bucket.read(name)
        config = None if found is None else json.loads(found[0])
    except (OSError, ValueError) as error:
        raise RunError(f"--config={url} cannot be read ({error}); give the {CONFIG} of a run") from error
    if not isinstance(config, dict):
        raise RunError(f"--config={url} does not hold flags; give the {CONFIG} of a run")
    return config


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            entries.update(_flat(value, f"{prefix}{key}."))
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def _show(value: Any) -> str:
    if value is None:
        return _UNSET
    return value if isinstance(value, str) else json.dumps(value)
