"""The loader of weights: layouts, types, shards, and every way in which a file can be wrong."""

import json
import pickle
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from micro import quick_compiles  # noqa: F401
from published_models import BERT, bert_tensors, publish

from experiments.models import published, tensors, weights
from experiments.models.bert import Bert, BertConfig
from experiments.models.bert_heads import SentenceEmbedder, SequenceClassifier, TokenClassifier
from experiments.models.weights import Layout, Row, Table

ONE = BERT | {"num_hidden_layers": 1}
QUERY = "encoder.layer.0.attention.self.query.weight"


def made(make=Bert, *arguments, **options):
    config = BertConfig(layers=1, d_model=24, heads=3, d_ff=40, vocab=50, positions=12)
    return nnx.eval_shape(lambda: make(config, *arguments, jnp.float32, **options, rngs=nnx.Rngs(0)))


def params(model):
    return {"/".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_layouts_are_those_of_index_arithmetic():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(rows, 5)) for rows in (3 * 2 * 4, 3 * 4, 3 * 4)]
    layout = Layout(transposed=True, shares=(2, 1, 1), groups=3)
    joined = layout.join(parts)
    assert joined.shape == (5, 3 * 4 * 4)
    for column in range(joined.shape[1]):
        group, within = divmod(column, 16)
        part, row = ((0, within), (1, within - 8), (2, within - 12))[(within >= 8) + (within >= 12)]
        np.testing.assert_array_equal(joined[:, column], parts[part][group * (8, 4, 4)[part] + row])
    for part, back in zip(parts, layout.split(joined), strict=True):
        np.testing.assert_array_equal(part, back)
    [same] = Layout().split(parts[0])
    np.testing.assert_array_equal(same, parts[0])


class Stack(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((1, 2, 3)))


def test_a_stack_of_one_layer_is_still_a_stack(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(3, 2)
    safetensors.numpy.save_file({"layer.0.weight": value}, tmp_path / "model.safetensors")
    model = Stack()
    weights.load(model, Table((Row("kernel", ("layer.{i}.weight",), weights.TRANSPOSED),), layers=1), tmp_path)
    np.testing.assert_array_equal(model.kernel[...], value.T[None])


def test_a_table_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="The table of names is not of this model, they differ in 'bias', 'kernel'"):
        weights.load(Stack(), Table((Row("bias", ("bias",)),), layers=1), tmp_path)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_weights_become_float32_of_the_same_value(tmp_path, dtype):
    narrow = {name: tensor.astype(dtype) for name, tensor in bert_tensors(ONE).items()}
    publish(tmp_path, ONE, narrow)
    model = made()
    published.load(model, tmp_path)
    kernel = params(model)["blocks/0/attention/qkv/kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[:, :24], narrow[QUERY].astype(np.float32).T)


def test_a_file_of_the_encoder_alone_comes_back_bit_for_bit(tmp_path):
    given = bert_tensors(ONE, pooler=True)
    publish(tmp_path / "given", ONE, given)
    model = made(pooler=True)
    published.load(model, tmp_path / "given")
    published.save(model, tmp_path / "saved")
    assert published.bert_config(tmp_path / "saved") == model.config
    written = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert {n: t.tobytes() for n, t in written.items()} == {n: t.tobytes() for n, t in given.items()}
    # Over the file that is there, of which nothing else is left.
    published.save(model, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_with_a_head_is_written_with_the_prefix_and_read_again(tmp_path):
    given = bert_tensors(ONE, pooler=True, prefix="bert.", classifier=(5, 24))
    publish(tmp_path, ONE, given)
    model, again = made(SequenceClassifier, 5), made(SequenceClassifier, 5)
    published.load(model, tmp_path)
    published.save(model, tmp_path / "saved")
    assert safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors").keys() == given.keys()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
    published.load(again, tmp_path / "saved")
    for name, value in params(model).items():
        assert params(again)[name].tobytes() == value.tobytes()


def test_a_first_bert_loads_with_its_old_names_and_pretraining_heads(tmp_path):
    given = bert_tensors(ONE, pooler=True, prefix="bert.")
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in given.items()}
    old["bert.embeddings.position_ids"] = np.arange(12)[None]
    for name in ("predictions.transform.dense", "predictions.transform.LayerNorm", "seq_relationship"):
        end = ("gamma", "beta") if "Norm" in name else ("weight", "bias")
        old |= {f"cls.{name}.{e}": np.ones(2, np.float32) for e in end}
    old |= {"cls.predictions.bias": np.ones(50, np.float32), "cls.predictions.decoder.weight": np.ones(2, np.float32)}
    publish(tmp_path / "old", ONE, old)
    publish(tmp_path / "new", ONE, given)
    models = made(SentenceEmbedder), made(SentenceEmbedder)
    for model, name in zip(models, ("old", "new"), strict=True):
        published.load(model, tmp_path / name)
    for name, value in params(models[0]).items():
        np.testing.assert_array_equal(value, params(models[1])[name])
    publish(tmp_path / "old", ONE, old | {"bert.embeddings.LayerNorm.weight": np.ones(24, np.float32)})
    with pytest.raises(ValueError, match="holds both 'bert.embeddings.LayerNorm.(weight|gamma)' and 'bert.embeddings"):
        published.load(models[0], tmp_path / "old")


def test_only_what_the_caller_calls_new_may_be_absent(tmp_path):
    publish(tmp_path, ONE, bert_tensors(ONE, pooler=True))
    config = published.bert_config(tmp_path)
    model = nnx.jit(lambda: SequenceClassifier(config, 5, jnp.float32, rngs=nnx.Rngs(0)))()
    before = params(model)
    with pytest.raises(ValueError, match="lacks 'classifier.weight', 'classifier.bias': give weights of the model"):
        published.load(model, tmp_path)
    assert params(model)["encoder/embeddings/token/embedding"].tobytes() == (
        before["encoder/embeddings/token/embedding"].tobytes()
    )
    assert published.load(model, tmp_path, new=["head"]) == ("head/kernel", "head/bias")
    after = params(model)
    changed = {name for name, value in after.items() if value.tobytes() != before[name].tobytes()}
    assert changed == after.keys() - {"head/kernel", "head/bias"}
    with pytest.raises(ValueError, match="Unknown optional module 'heads' .did you mean 'head'"):
        published.load(model, tmp_path, new=["heads"])
    # Half a head is no new one.
    publish(tmp_path, ONE, bert_tensors(ONE, pooler=True) | {"classifier.bias": np.ones(5, np.float32)})
    with pytest.raises(ValueError, match="lacks 'classifier.weight'"):
        published.load(model, tmp_path, new=["head"])


def without(*names):
    return lambda given: {name: tensor for name, tensor in given.items() if name not in names}


def with_(**values):
    return lambda given: given | {name.replace("__", "."): value for name, value in values.items()}


def replaced(value):
    return lambda given: given | {QUERY: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(QUERY), f"lacks '{QUERY}': give weights of the model that config.json describes"),
        (without(*bert_tensors(ONE)), "lacks 'embeddings.word_embeddings.weight', .* and 18 more: give"),
        (with_(classifier__weight=np.ones(3)), "holds 'classifier.weight', for which the model has no place"),
        (with_(bert__pooler=np.ones(3)), "lacks 'bert.embeddings.word_embeddings.weight'"),
        (replaced(np.ones((24, 23), np.float32)), f"'{QUERY}' in .* has shape .24, 23., where the model's is .24, 24."),
        (replaced(np.ones(576, np.float32)), r"has shape \(576,\), where the model's is \(24, 24\)"),
        (
            replaced(np.ones((24, 24), np.int8)),
            f"'{QUERY}' in .*model.safetensors is of type I8, not one of F32, F16, ",
        ),
        (replaced(np.ones((24, 24), np.float64)), "is of type F64"),
        (replaced(np.ones((24, 24), ml_dtypes.float8_e4m3fn)), "is of type F8_E4M3"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(tmp_path, change, message):
    publish(tmp_path, ONE, change(bert_tensors(ONE)))
    with pytest.raises(ValueError, match=message) as error:
        published.load(made(), tmp_path)
    assert str(tmp_path) in str(error.value)
    assert is_sentence(str(error.value))


def is_sentence(text):
    return text.endswith(".") and "\n" not in text and len(text) < 400


def raw(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        pickle.dumps({"weights": Exploit()}),
        pickle.dumps(Exploit(), protocol=0) * 40,
        b"PK\x03\x04" + bytes(1000),
        raw(b"{"),
        raw(b"[]"),
        raw(b"\xff\xfe\x00"),
        struct.pack("<Q", 2**63) + b"{}",
        raw({"a": entry(0, 8)}, bytes(4)),
        raw({"a": entry(0, 8)}, bytes(12)),
        raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        raw({"a": entry(4, 12)}, bytes(12)),
        raw({"a": entry(0, 8, shape=[3])}, bytes(8)),
        raw({"a": entry(0, 8, shape=[-2])}, bytes(8)),
        raw({"a": entry(0, 8, shape=[2**62, 4])}, bytes(8)),
        raw({"a": entry(0, 8, dtype="PICKLE\n\n")}, bytes(8)),
        raw({"a": {"dtype": "F32"}}),
    ],
)
def test_a_damaged_or_hostile_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match="model.safetensors is no safetensors file, or a damaged one") as error:
            tensors.find(place)
        assert is_sentence(str(error.value))


def test_a_truncated_model_changes_nothing(tmp_path):
    publish(tmp_path, ONE, bert_tensors(ONE))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="or a damaged one"):
        published.load(made(), tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(ValueError, match="holds neither model.safetensors nor .*: give weights as safetensors, not as"):
        published.load(made(), tmp_path)
    with pytest.raises(ValueError, match="nowhere.safetensors cannot be read"):
        published.load(made(), tmp_path / "nowhere.safetensors")


def shard(folder, given, places):
    for place in set(places.values()):
        safetensors.numpy.save_file({n: given[n] for n in places if places[n] == place and n in given}, folder / place)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))


def two_shards(given):
    return {name: (FIRST, SECOND)[i % 2] for i, name in enumerate(given)}


def test_shards_give_what_one_file_does(tmp_path):
    given = bert_tensors(ONE)
    publish(tmp_path / "one", ONE, given)
    (tmp_path / "many").mkdir()
    shard(tmp_path / "many", given, two_shards(given))
    models = [made() for _ in range(3)]
    for model, place in zip(models, ("one", "many", f"many/{INDEX}"), strict=True):
        published.load(model, tmp_path / place)
    for name, value in params(models[0]).items():
        for other in models[1:]:
            assert params(other)[name].tobytes() == value.tobytes()


INDEX, FIRST, SECOND = "model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def test_a_shard_that_is_absent_is_named(tmp_path):
    given = bert_tensors(ONE)
    shard(tmp_path, given, two_shards(given))
    (tmp_path / SECOND).unlink()
    with pytest.raises(ValueError, match=f"{SECOND} cannot be read"):
        published.load(made(), tmp_path)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (None, "index.json has no weight_map"),
        ([QUERY], "index.json has no weight_map"),
        ({QUERY: [FIRST]}, "index.json has no weight_map"),
        ({QUERY: "../model.safetensors"}, r"index.json names '../model.safetensors', which is no .safetensors file be"),
        ({QUERY: "/etc/x.safetensors"}, "index.json names '/etc/x.safetensors'"),
        ({QUERY: "pytorch_model.bin"}, "index.json names 'pytorch_model.bin'"),
        ({"new": FIRST}, f"{FIRST} does not hold 'new', which .*index.json says"),
        ({QUERY: "absent"}, f"holds '{QUERY}', which .*index.json does not say"),
    ],
)
def test_an_index_that_is_not_as_its_shards_are_is_named(tmp_path, places, message):
    given = bert_tensors(ONE)
    right = two_shards(given)
    shard(tmp_path, given, right)
    if isinstance(places, dict):
        places = {name: file for name, file in (right | places).items() if file != "absent"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=message) as error:
        published.load(made(), tmp_path)
    assert is_sentence(str(error.value))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    publish(tmp_path / "given", ONE, bert_tensors(ONE))
    model = made()
    published.load(model, tmp_path / "given")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be written .File exists.: choose another folder"):
        published.save(model, tmp_path / "file")
    with pytest.raises(ValueError, match="missing/model.safetensors cannot be written"):
        weights.save(model, published.names.table(model), tmp_path / "missing" / "model.safetensors")


def test_casings_are_written_under_a_name_of_our_own(tmp_path):
    publish(tmp_path, ONE, bert_tensors(ONE))
    config = published.bert_config(tmp_path)
    model = nnx.jit(lambda: TokenClassifier(config, 5, jnp.float32, casings=4, rngs=nnx.Rngs(0)))()
    stayed = published.load(model, tmp_path, new=["head", "encoder/embeddings/casing"])
    assert stayed == ("head/kernel", "head/bias", "encoder/embeddings/casing/embedding")
    published.save(model, tmp_path / "saved")
    written = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert written["bert.embeddings.casing_embeddings.weight"].shape == (4, 24)
