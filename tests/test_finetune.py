"""Fine-tuning runs: every task learns, a run that was stopped ends as one that was not, and what is kept is tested."""

import json
import shutil

import finetune_cases as cases
import numpy as np
import pytest
import safetensors.numpy
from finetune_cases import former_cache  # noqa: F401
from micro import quick_compiles  # noqa: F401

from experiments import finetune, runs
from experiments.downstream import options
from experiments.models import folder

FEW = ("--epochs=3", "--lr=0.02", "--log_every=1")


def tensors(workdir):
    return safetensors.numpy.load_file(workdir / "best" / "model.safetensors")


class Stops:
    """In the place of signals: tells the run to leave after a step."""

    def __init__(self, step=None):
        self.step, self.requested = step, None

    def __call__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def reached(self, step):
        self.requested = "SIGTERM" if step == self.step else None
        return step == self.step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_was_not_stopped(tmp_path, model, monkeypatch):
    flags = (f"--task={cases.texts(tmp_path / 'data')}", f"--model={model}", "--precision=fp8", "--length=8", *FEW)
    whole, parts = (cases.run_of(*flags, f"--workdir={tmp_path / name}") for name in ("whole", "parts"))
    summary = whole.execute()
    assert summary["metric"] == "accuracy" and len(summary["scores"]["texts"]["classes"]) == 2
    monkeypatch.setattr(runs, "StopSignal", Stops(3))  # within the second epoch
    assert parts.execute() is None and parts.interrupted
    monkeypatch.setattr(runs, "StopSignal", Stops())
    again = parts.execute()
    peak = "peak_memory_bytes"
    assert {k: v for k, v in again.items() if k != peak} == {k: v for k, v in summary.items() if k != peak}
    lines = [runs.read_metrics(tmp_path / name) for name in ("whole", "parts")]
    speed = "positions_per_second"
    assert [{k: v for k, v in line.items() if k != speed} for line in lines[0]] == [
        {k: v for k, v in line.items() if k != speed} for line in lines[1]
    ]
    assert len(lines[0]) == whole.steps == 6 and [line["step"] for line in lines[0] if "valid" in line] == [2, 4, 6]
    for (name, value), other in zip(tensors(tmp_path / "whole").items(), tensors(tmp_path / "parts").values()):
        np.testing.assert_array_equal(value, other, err_msg=name)
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["value"] == summary["test"] and report["scores"]["texts"]["averages"][1]["name"] == "macro"
    assert "weighted" in (tmp_path / "whole" / "report.txt").read_text()
    assert (tmp_path / "whole" / "f1_texts.pdf").stat().st_size > 1000
    # What is finished says so, and another configuration is refused.
    assert parts.execute() == json.loads(json.dumps(again))
    other = cases.run_of(*flags, "--seed=1", f"--workdir={tmp_path / 'whole'}")
    with pytest.raises(runs.RunError, match="--seed=0"):
        other.execute()


@pytest.mark.slow
def test_tags_are_learned_by_casing_and_scored_as_words_and_entities(tmp_path, model):
    task = cases.tags(tmp_path / "data")
    flags = (f"--task={task}", "--precision=fp32", "--length=16", "--epochs=12", "--lr=0.02", "--batch_size=8")
    run = cases.run_of(*flags, f"--model={model}", f"--workdir={tmp_path / 'run'}")
    assert "encoder/embeddings/casing/embedding" in run.new and "head/kernel" in run.new
    summary = run.execute()
    assert summary["test"] > 0.95 and set(summary["scores"]) == {"words", "entities"}
    stored = folder.read(str(tmp_path / "run" / "best"))
    assert stored.purpose.casings == 6 and stored.purpose.scheme == "IOB2" and stored.purpose.classes == ("O", "B-LOC")
    # What was trained for these tags is for no other classes, and goes on where it was with these.
    other = cases.texts(tmp_path / "texts")
    with pytest.raises(ValueError, match="has been trained for token-classification with 2 classes"):
        cases.run_of(f"--task={other}", f"--model={tmp_path / 'run' / 'best'}")
    more = cases.run_of(*flags, f"--model={tmp_path / 'run' / 'best'}")
    assert more.new == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["questions", "prompts"])
def test_spans_and_targets_are_learned(tmp_path, model, kind):
    if kind == "questions":
        given = (f"--task={cases.questions(tmp_path / 'data')}", f"--model={model}", "--length=96")
    else:
        given = f"--task={cases.prompts(tmp_path / 'data')}", f"--model={cases.gpt2(tmp_path / 'gpt2')}", "--length=16"
    flags = (*given, "--precision=fp32", "--epochs=12", "--lr=0.02", "--batch_size=8", f"--workdir={tmp_path / 'run'}")
    summary = cases.run_of(*flags).execute()
    if kind == "questions":
        assert summary["metric"] == "F1 of answers" and summary["test"] == 1
        assert not folder.read(str(tmp_path / "run" / "best")).purpose.may_be_none
    else:
        assert summary["scores"]["exact"]["value"] == 1
        assert 1 < summary["scores"]["perplexity"]["value"] < 1.5


@pytest.mark.slow
def test_early_stopping_keeps_the_best_model_and_not_the_last(tmp_path, model, monkeypatch):
    flags = (f"--task={cases.texts(tmp_path / 'data')}", f"--model={model}", "--precision=fp32", "--length=8")
    run = cases.run_of(*flags, "--epochs=9", "--patience=2", f"--workdir={tmp_path / 'run'}")
    scores = iter([0.3, 0.7, 0.7, 0.6])
    states = []

    def validate(state):
        states.append(np.asarray(state["params"]["head"]["kernel"]).T)
        return type("Report", (), {"metric": "accuracy", "value": next(scores)})

    monkeypatch.setattr(run, "validate", validate)
    summary = run.execute()
    assert (summary["best_epoch"], summary["valid"], len(states)) == (2, 0.7, 4)
    np.testing.assert_array_equal(tensors(tmp_path / "run")["classifier.weight"], states[1])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, model, capsys):
    task = cases.texts(tmp_path / "data")
    options.parse(
        [
            *("finetune", f"--task={task}", f"--model={model}", "--precision=fp32", "--length=8", "--lr=1e38"),
            *("--optimizer=sgd", "--warmup=0", f"--cache_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"),
        ]
    )
    assert finetune.main(["finetune"]) == finetune.DIVERGED
    assert "lower --lr" in capsys.readouterr().err
    assert "not finite" in json.loads((tmp_path / "run" / "diverged.json").read_text())["reason"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=digit"], "^--task=digit is no task .did you mean 'digits'"),
        (["--model=lstm"], "--model=lstm is for token-classification, where --task=digits is image-classification"),
        (["--model=nowhere"], "nowhere is no folder with a config.json"),
        (["--precision=int9"], "--precision=int9: Unknown precision"),
        (["--precision=stem->int8;nothing->fp8"], "matches no layer"),
        (["--quantize=blokcs"], "did you mean 'blocks'"),
        (["--epochs=0"], "--epochs=0 must be at least 1"),
        (["--optimizer=adam"], "did you mean 'adamw'"),
        (["--optimizer=sgd", "--b1=0.5"], "--b1 has no effect on --optimizer=sgd"),
        (["--momentum=0.5"], "--momentum has no effect on --optimizer=adamw"),
        (["--optimizer=sgd", "--momentum=1"], "--momentum=1.0 must be"),
        (["--decay=0.3"], "--decay has no effect on --schedule=linear"),
        (["--temperature=3"], "--temperature has no effect without --distill"),
        (["--distill=x", "--distill_weight=0"], "--distill_weight=0.0 must be above 0"),
        (["--qat=weight"], "did you mean 'weights'"),
        (["--ranges=static"], "--ranges has no effect without --qat"),
        (["--qat=weights", "--ranges=static"], "which --qat=weights leaves wide"),
        (["--qat=both", "--recalibrate_every=3"], "no effect without --ranges=static"),
        (["--qat=both", "--precision=bf16"], "--precision=bf16: it quantizes nothing"),
        (["--lr=-1"], "--lr=-1.0 must be positive"),
        (["--seed=-1"], "--seed=-1 must be from 0"),
    ],
)
def test_what_is_wrong_with_flags_is_a_sentence(flags, message):
    with pytest.raises(ValueError, match=message):
        cases.run_of(*flags)


def test_what_does_not_fit_the_model_is_a_sentence(tmp_path, model):
    texts = f"--task={cases.texts(tmp_path / 'data')}"
    with pytest.raises(ValueError, match="--length=97 is longer than the model's 96 positions"):
        cases.run_of(texts, f"--model={model}", "--length=97")
    with pytest.raises(ValueError, match="sentence-embedding', where the model has 'text-classification'"):
        cases.run_of(texts, f"--model={model}", "--length=8", f"--distill={model}")
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        cases.run_of(texts, f"--model={bare}")
    with pytest.raises(ValueError, match="has no text|lacks|missing|column"):
        cases.run_of(f"--task=csv:{tmp_path / 'data'},text=words,label=label", f"--model={model}")
