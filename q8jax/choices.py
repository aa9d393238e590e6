"""One sentence for every misspelt option."""

import difflib
from collections.abc import Iterable


def check(what: str, value: object, valid: Iterable[str]) -> None:
    """Raises ValueError, naming the valid choices and the nearest, unless `value` is valid."""
    names = list(valid)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"Unknown {what} {value!r}{hint}: choose one of {', '.join(names)}.")
