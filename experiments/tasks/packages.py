"""Data inside packages that are installed for it alone: where it lies, found without importing the package."""

from __future__ import annotations

import importlib.util
import os


def folder(flag: str, package: str, install: str) -> str:
    """The folder of a package.

    Args:
      flag: the flag and its value, which opens the message.
      package: by the name under which it would be imported.
      install: the command that installs it.

    Raises:
      ValueError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"{flag} is data of the package {package}, which is not installed: run `{install}`.")
    return found.submodule_search_locations[0]


def file(flag: str, folder: str, *parts: str) -> str:
    """A file below a folder of a package.

    Raises:
      ValueError: this version has none.
    """
    path = os.path.join(folder, *parts)
    if not os.path.isfile(path):
        raise ValueError(f"{flag} expects {path}, which is missing: install the package again, or another version.")
    return path
