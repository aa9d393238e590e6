"""Folders of models: what is saved comes back bit for bit, for every kind and task, and what is wrong is named."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import BERT, GPT2, LLAMA, bert, bert_tensors, gpt2_tensors, llama_tensors, publish
from wordpiece import made

import q8jax.nnx as qnnx
from experiments.models import folder
from experiments.models.cnn import CnnConfig
from experiments.models.config import RopeScaling, TransformerConfig
from experiments.models.kinds import KINDS, policy_of
from experiments.models.purpose import TASKS, Purpose
from experiments.models.recurrent import RecurrentConfig

IDS = np.arange(6, dtype=np.int32).reshape(2, 3)
MASK = np.ones((2, 3), bool)
SIZES = {"layers": 1, "d_model": 8, "heads": 2, "kv_heads": 1, "d_ff": 16}
OWN = {
    "q8jax-transformer": [
        TransformerConfig(**SIZES),
        TransformerConfig(**SIZES, activation="gelu", tied=True, rope_scaling=RopeScaling(8.0, 0.2, 1.0, 8)),
    ],
    "q8jax-cnn": [CnnConfig(classes=2, stem=8, widths=(16,), groups=4)],
    "q8jax-lstm": [RecurrentConfig(vocab=20, classes=2, d_model=4, hidden=6, layers=2)],
}
CASES = [("bert", {}, task) for task in KINDS["bert"].tasks]
CASES += [(kind, shapes, KINDS[kind].tasks[0]) for kind, several in OWN.items() for shapes in several]


def purpose_of(task):
    casings = 6 if task == "token-classification" else 0
    return Purpose(task, ("x", "y"), casings=casings, size=(4, 4, 1), mean=(0.5,), sd=(2.0,))


def shapes_of(kind, shapes, tmp_path):
    if kind != "bert":
        return shapes
    options = BERT | {"num_hidden_layers": 1}
    return KINDS["bert"].read(publish(tmp_path / "published", options, bert_tensors(options)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shapes", "task"),
    # Those with something of their own at once: casings, stacks, convolutions, recurrence.
    [pytest.param(*case, marks=[pytest.mark.slow] * (i not in (2, 5, 7, 8))) for i, case in enumerate(CASES)],
)
def test_what_is_saved_comes_back(tmp_path, kind, shapes, task):
    shapes = shapes_of(kind, shapes, tmp_path)
    policy = policy_of(KINDS[kind], "fp8", ("blocks", "head") if kind != "bert" else ("blocks",))
    purpose = dataclasses.replace(purpose_of(task), policy=str(policy))
    model = folder.build(KINDS[kind], shapes, purpose, policy, seed=3)
    for state in nnx.state(model, qnnx.Scale), nnx.state(model, nnx.Param):
        # So that nothing of it is what a new model has.
        nnx.update(model, jax.tree.map(lambda x: x * 1.5 + 2**-6, state))
    folder.save(tmp_path / "model", model, purpose)
    again, stored = folder.load(str(tmp_path / "model"))
    assert (stored.shapes, stored.purpose, stored.kind) == (shapes, purpose, KINDS[kind])
    assert stored.policy == policy and stored.tokenizer == ""
    for kept in (nnx.Param, nnx.Not(nnx.Param)):
        before, after = (dict(nnx.to_flat_state(nnx.state(m, kept))) for m in (model, again))
        assert before.keys() == after.keys() and before
        for path, variable in before.items():
            np.testing.assert_array_equal(variable[...], after[path][...], err_msg=str(path))
    # Of one structure and with equal variables, they compute the same.
    assert nnx.graphdef(model) == nnx.graphdef(again)


def test_every_task_has_a_kind_and_every_kind_a_case():
    assert {task for kind in KINDS.values() for task in kind.tasks} == set(TASKS)
    assert {case[0] for case in CASES} | {"gpt2", "llama"} == set(KINDS)


@pytest.mark.parametrize(
    ("options", "tensors", "task"),
    [
        (BERT, bert_tensors(pooler=True), "sentence-embedding"),
        (GPT2, gpt2_tensors(), "text-generation"),
        pytest.param(LLAMA, llama_tensors(), "text-generation", marks=pytest.mark.slow),
    ],
)
def test_published_folders_are_folders_and_stay_published_when_saved(tmp_path, options, tensors, task):
    published = publish(tmp_path / "published", options, tensors)
    subwords, _ = made(published / "tokenizer.json")
    model, stored = folder.load(str(published))
    assert stored.purpose == Purpose(task, tokenizer="tokenizer.json") and stored.tokenizer == subwords.name
    folder.save(tmp_path / "saved", model, stored.purpose, tokenizer=stored.tokenizer)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert {name.removeprefix("transformer.") for name in saved} == {n for n in tensors if "pooler" not in n}
    for name, value in saved.items():
        np.testing.assert_array_equal(value, tensors[name.removeprefix("transformer.")])
    if options is BERT:
        expected = bert(tensors, BERT, IDS[1]).sum(0)
        np.testing.assert_allclose(model(IDS, MASK)[1], expected / np.linalg.norm(expected), rtol=2e-4, atol=1e-5)


def test_an_installed_package_is_found_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "some_model" / "inner").mkdir(parents=True)
    (tmp_path / "some_model" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="package:some_model holds no model.safetensors beside a config.json"):
        folder.find("package:some_model")
    publish(tmp_path / "some_model" / "inner", BERT, bert_tensors())
    assert folder.find("package:some_model") == tmp_path / "some_model" / "inner"
    assert "some_model" not in sys.modules
    publish(tmp_path / "some_model" / "other", BERT, bert_tensors())
    with pytest.raises(ValueError, match="package:some_model holds several models, in .*inner, .*other"):
        folder.find("package:some_model")
    for wrong in ("package:no_such_model", "package:../up", "package:"):
        with pytest.raises(ValueError, match=f"{wrong} is not installed"):
            folder.find(wrong)
    with pytest.raises(ValueError, match="nowhere is no folder with a config.json"):
        folder.find(str(tmp_path / "nowhere"))


@pytest.fixture
def quantized(tmp_path):
    config = OWN["q8jax-lstm"][0]
    policy = policy_of(KINDS["q8jax-lstm"], "int8/history=3")
    purpose = Purpose("token-classification", ("x", "y"), policy=str(policy))
    folder.save(tmp_path / "model", folder.build(KINDS["q8jax-lstm"], config, purpose, policy), purpose)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"task": "token-clasification"}, "did you mean 'token-classification'"),
        ({"clases": ["x"]}, "entry of q8jax in .*config.json.*did you mean 'classes'"),
        ({"classes": ["x", 2]}, r"gives q8jax.classes the value \('x', 2\)"),
        ({"length": True}, "gives q8jax.length the value True"),
        ({"scheme": 3}, "gives q8jax.scheme the value 3"),
        ({"task": "text-generation"}, "says text-generation, for which there is no such model"),
    ],
)
def test_what_is_wrong_in_config_json_is_named(quantized, entry, message):
    options = json.loads((quantized / "config.json").read_text())
    options["q8jax"] |= entry
    (quantized / "config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match=message):
        folder.read(str(quantized))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o | {"model_type": "q8jax-gru"}, "model_type 'q8jax-gru', none of bert"),
        (lambda o: o | {"q8jax": 3}, "gives q8jax the value 3, which must be an object"),
        (lambda o: o | {"q8jax": {}}, "does not say q8jax.task"),
        (lambda o: o | {"shapes": o["shapes"] | {"hidden": 0}}, "hidden=0 must be at least 1"),
        (lambda o: o | {"shapes": o["shapes"] | {"hidden": "6"}}, "gives shapes.hidden the value '6'"),
        (lambda o: o | {"shapes": {}}, "does not say shapes.vocab"),
        (lambda o: o | {"shapes": o["shapes"] | {"hidden": 7}}, "has shape .* where the model's is"),
    ],
)
def test_what_is_wrong_in_the_options_is_named(quantized, change, message):
    options = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(change(options)))
    with pytest.raises(ValueError, match=message):
        folder.load(str(quantized))


def test_scales_are_held_to_the_policy_and_left_out_with_another(quantized):
    file = quantized / "scales.safetensors"
    scales = safetensors.numpy.load_file(file)
    path = "layers.0.inputs.dot_general.scale"
    safetensors.numpy.save_file(scales | {path: scales[path] * 3}, file)
    stored, _ = folder.load(str(quantized))
    np.testing.assert_array_equal(stored.layers[0].inputs.dot_general.scale[...], scales[path] * 3)
    other, _ = folder.load(str(quantized), policy=policy_of(KINDS["q8jax-lstm"], "fp8"))
    np.testing.assert_array_equal(other.layers[0].inputs.dot_general.scale[...], jnp.ones(3))
    for wrong, message in [
        ({n: v for n, v in scales.items() if n != path}, f"differ in '{path}'"),
        (scales | {"more": scales[path]}, "differ in 'more'"),
        (scales | {path: scales[path].astype(np.float16)}, "float16 of shape"),
        (scales | {path: scales[path][:0]}, "of shape"),
    ]:
        safetensors.numpy.save_file(wrong, file)
        with pytest.raises(ValueError, match=message):
            folder.load(str(quantized))
    file.unlink()
    with pytest.raises(ValueError, match=r"scales.safetensors cannot be read"):
        folder.load(str(quantized))


def test_policies_of_a_kind():
    bert_kind = KINDS["bert"]
    assert str(policy_of(bert_kind, "fp8").recipe_for("encoder/blocks/11/mlp/up")) == str(
        policy_of(bert_kind, ".*->fp8").recipe_for("head")
    )
    assert not policy_of(bert_kind, "fp8").recipe_for("head").is_quantized
    assert policy_of(bert_kind, "fp8", ("head", "attention")).recipe_for("head").is_quantized
    with pytest.raises(ValueError, match="leave --quantize out"):
        policy_of(bert_kind, ".*->fp8", ("head",))
    with pytest.raises(ValueError, match="part to quantize"):
        policy_of(KINDS["q8jax-cnn"], "fp8", ("attention",))
    with pytest.raises(ValueError, match="compute in bfloat16 and float32"):
        policy_of(bert_kind, "head->fp8;.*->fp32")
