"""Predictions: for each task those of the model on that input alone, by whatever batch and order they came."""

import io
import json

import finetune_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest
from finetune_cases import former_cache  # noqa: F401
from flax import nnx
from micro import quick_compiles  # noqa: F401

from experiments import commandline, predict
from experiments.downstream.predicting import Predictor, read_images, read_lines
from experiments.encoding import CASINGS, Subwords
from experiments.models import folder
from experiments.models.cnn import CnnConfig
from experiments.models.kinds import KINDS, policy_of
from experiments.models.purpose import Purpose

TEXTS = ["hello world us", "a", "b a hello us us a b hello world a b a us a b hello", "", "us . us"]


def saved(tmp_path, task, classes=("no", "yes"), **more):
    """A folder with a tiny BERT for a task, in INT8."""
    published = folder.read(cases.bert(tmp_path / "bert"))
    policy = policy_of(KINDS["bert"], "int8-row")
    purpose = Purpose(task, classes, length=96 if task == "question-answering" else 24, policy=str(policy), **more)
    model = folder.build(published.kind, published.shapes, purpose, policy)
    folder.load_weights(model, published.folder, new=folder.table(model).optional)
    folder.save(tmp_path / task, model, purpose, tokenizer=published.tokenizer)
    return tmp_path / task


def run(*flags, capsys, cache):
    commandline.parse(predict.VALUES, predict.GROUPS, ["predict", f"--cache_dir={cache}", *map(str, flags)])
    code = predict.main(["predict"])
    told = capsys.readouterr()
    return code, [json.loads(line) for line in told.out.splitlines()], told.err


def alone(place, text):
    model, stored = folder.load(str(place))
    frame, [pieces] = Subwords.load(stored.tokenizer).single, Subwords.load(stored.tokenizer).split([text])
    ids = np.array([[*frame.opening, *pieces.ids, *frame.closing]], np.int32)
    return np.asarray(nnx.jit(lambda model: model(ids, np.ones(ids.shape, bool)))(model))[0]


@pytest.mark.slow
def test_labels_are_those_of_each_text_alone(tmp_path, capsys):
    place = saved(tmp_path, "text-classification")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    code, lines, told = run(
        f"--model={place}", f"--input={tmp_path / 'in.txt'}", "--batch_size=3", capsys=capsys, cache=tmp_path
    )
    assert code == 0 and len(lines) == 4 and "4 inputs in 2 batches of 3: latency p50" in told and "p99" in told
    for line, text in list(zip(lines, filter(None, TEXTS), strict=True))[1:3]:
        logits = np.float64(alone(place, text))
        probabilities = np.exp(logits) / np.exp(logits).sum()
        assert line["label"] == ("no", "yes")[int(np.argmax(logits))]
        np.testing.assert_allclose(line["probability"], probabilities.max(), atol=0.01)


@pytest.mark.slow
def test_embeddings_are_those_of_each_text_alone(tmp_path, capsys):
    place = cases.bert(tmp_path / "bert")
    rows = "\n".join(json.dumps({"text": text, "more": 1}) for text in TEXTS if text)
    (tmp_path / "in.jsonl").write_text(rows)
    out = tmp_path / "out.jsonl"
    code, _, _ = run(
        f"--model={place}", f"--input={tmp_path / 'in.jsonl'}", f"--output={out}", capsys=capsys, cache=tmp_path
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert len(lines) == 4
    for line, text in list(zip(lines, filter(None, TEXTS)))[1:3]:
        np.testing.assert_allclose(line["embedding"], alone(place, text), atol=1e-5)


@pytest.mark.slow
def test_tags_are_of_words_and_mark_entities(tmp_path, monkeypatch, capsys):
    classes = ("O", "B-LOC", "I-LOC")
    place = saved(tmp_path, "token-classification", classes, scheme="IOB2", casings=len(CASINGS))
    monkeypatch.setattr("sys.stdin", io.StringIO('{"words": ["Hello", "us."]}\n{"text": "Hello, us"}\n'))
    code, lines, _ = run(f"--model={place}", "--format=jsonl", capsys=capsys, cache=tmp_path)
    assert code == 0 and [line["words"] for line in lines] == [["Hello", "us."], ["Hello", ",", "us"]]
    model, stored = folder.load(str(place))
    # [CLS] hello us . [SEP]; the classes are those of the first piece of each word.
    ids = np.array([[2, 4, Subwords.load(stored.tokenizer).words(["us"])[0][0], 11, 3]], np.int32)
    casings = np.array([[0, 3, 2, 2, 0]], np.int32)
    logits = nnx.jit(lambda model: model(ids, np.ones((1, 5), bool), None, casings))(model)
    assert lines[0]["tags"] == [classes[int(i)] for i in jnp.argmax(logits[0], -1)[1:3]]
    for line in lines:
        for entity in line["entities"]:
            assert entity["text"] == " ".join(line["words"][entity["first"] : entity["last"] + 1])
            assert all(tag.endswith(entity["type"]) for tag in line["tags"][entity["first"] : entity["last"] + 1])


@pytest.mark.slow
def test_answers_are_passages_and_what_lacks_a_question_is_named(tmp_path, capsys):
    place = saved(tmp_path, "question-answering", ())
    rows = [{"question": "a ?", "context": "us hello b"}, {"question": "b", "context": "hello"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, lines, _ = run(f"--model={place}", f"--input={tmp_path / 'in.jsonl'}", capsys=capsys, cache=tmp_path)
    assert code == 0 and all(line["answer"] and line["answer"] in row["context"] for line, row in zip(lines, rows))
    (tmp_path / "in.jsonl").write_text('{"question": "a"}')
    code, _, told = run(f"--model={place}", f"--input={tmp_path / 'in.jsonl'}", capsys=capsys, cache=tmp_path)
    assert code == 1 and "in.jsonl, line 1 has no text under 'context'" in told


def test_images_are_labelled(tmp_path):
    kind, policy = KINDS["q8jax-cnn"], policy_of(KINDS["q8jax-cnn"], "fp32")
    purpose = Purpose("image-classification", ("x", "y"), size=(4, 4, 1), mean=(100.0,), sd=(50.0,))
    shapes = CnnConfig(classes=2, stem=8, widths=(8,), groups=4)
    folder.save(tmp_path / "cnn", folder.build(kind, shapes, purpose, policy), purpose)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 4, 4), np.uint8)
    np.save(tmp_path / "in.npy", pixels)
    model, stored = folder.load(str(tmp_path / "cnn"))
    lines = list(Predictor(model, stored, 2)(read_images(str(tmp_path / "in.npy"))))
    normal = (pixels[..., None].astype(np.float32) - 100) / 50
    logits = np.asarray(nnx.jit(lambda model: model(normal))(model))
    assert [line["label"] for line in lines] == ["xy"[i] for i in logits.argmax(-1)]
    np.save(tmp_path / "in.npy", pixels.astype(np.int32))
    with pytest.raises(ValueError, match=r"in.npy is no array of images"):
        list(read_images(str(tmp_path / "in.npy")))


def test_lines_that_are_no_inputs_are_named():
    assert [one.value for one in read_lines(["a \n", "\n", "b"], "f", is_json=False)] == ["a", "b"]
    for line, message in [("{", "f, line 2 is no JSON"), ("[1]", "f, line 2 holds no JSON object")]:
        with pytest.raises(ValueError, match=message):
            list(read_lines(["{}", line], "f", is_json=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model is not given"),
        (["--model=nowhere"], "--model=nowhere: nowhere is no folder"),
        (["--model=x", "--input=nowhere"], "--input=nowhere does not exist"),
        (["--model=x", "--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--model=x", "--format=json"], "did you mean 'jsonl'"),
    ],
)
def test_what_is_wrong_with_flags_is_a_sentence(flags, message, tmp_path, capsys):
    code, lines, told = run(*flags, capsys=capsys, cache=tmp_path)
    assert code == 1 and not lines and message in told and told.startswith("predict: ")
