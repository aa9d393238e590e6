"""Text that goes into the record without telling where on which machine it was made."""

import re
from pathlib import Path


def without_places(text: str, study: Path) -> str:
    """`text` with paths within the study, the current directory and the home directory given from there."""
    roots = {
        str(study.expanduser().absolute()): ".",
        str(study.expanduser()): ".",
        str(Path.cwd()): ".",
        str(Path.home()): "~",
    }
    for root in sorted(roots, key=len, reverse=True):
        if len(root) > 1:
            text = re.sub(rf"{re.escape(root)}(?![\w.-])", roots[root], text)
    return text
