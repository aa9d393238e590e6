"""Checkpoints: exact values, verification, fallback, retention, and what a full disk does."""

import itertools
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments.runs import CheckpointError, Checkpoints
from experiments.runs import steps as steps_module

NARROW = [
    np.dtype(getattr(ml_dtypes, name))
    for name in (
        *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "int4", "uint4", "int2"),
    )
]


def state(step):
    """A tree whose every leaf depends on `step`."""
    return {"w": jnp.arange(12, dtype=jnp.float32).reshape(3, 4) + jnp.float32(step)}


def identical(a, b):
    return (
        type(a) is type(b)
        and a.dtype == b.dtype
        and a.shape == b.shape
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    )


def save_all(directory, steps, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"seen": step})
        checkpoints.wait()


def restore(directory, target=None):
    warnings = []
    with Checkpoints(directory, warn=warnings.append) as checkpoints:
        return checkpoints.latest_good(target or state(0)), warnings


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    tree = {
        "float32": jnp.array([1.5, -0.0, jnp.nan, jnp.inf, 1e-45], jnp.float32),
        "scalar": jnp.float32(3),
        "count": jnp.int32(7),
        "flag": jnp.array([True, False]),
        "key": jax.random.key_data(jax.random.key(5)),
        "empty": jnp.zeros((0, 3)),
        "nested": ({"a": None, "b": [jnp.ones((2,), jnp.float16)]}, jnp.zeros((1, 1))),
        "numpy": {
            "int64": np.arange(3) + 2**40,
            "scalar": np.asarray(np.float64(0.1)),
            "empty": np.zeros((2, 0), np.int8),
        },
        "narrow": {dtype.name: jnp.asarray(np.arange(8).astype(dtype)) for dtype in NARROW},
        "narrow_numpy": {dtype.name: np.arange(8).astype(dtype) for dtype in NARROW},
    }
    metadata = {"step": 4, "schedule": [[0, "bf16"], [2, "fp8"]], "loss": float("nan"), "x": 0.1}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(4, tree, metadata)
        checkpoints.wait()
        # Twice: from the arrays themselves, and from their specs alone.
        abstract = jax.tree.map(
            lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype),
            tree,
        )
        for target in (tree, abstract):
            restored = checkpoints.latest_good(target)
            assert restored.step == 4
            assert restored.metadata == {**metadata, "loss": None}
            assert jax.tree.structure(restored.tree) == jax.tree.structure(tree)
            same = jax.tree.map(identical, tree, restored.tree)
            assert all(jax.tree.leaves(same)), same


def test_plain_orbax_reads_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    save_all(tmp_path, [3])
    with ocp.StandardCheckpointer() as orbax:
        arrays = orbax.restore(tmp_path / "3" / "state", state(0))
    assert identical(arrays["w"], state(3)["w"])


def test_arrays_may_be_donated_or_overwritten_as_soon_as_save_returns(tmp_path):
    shape = (2_000_000,)
    device = jnp.arange(shape[0], dtype=jnp.float32)
    host = np.arange(shape[0], dtype=np.float32)
    expected = host.copy()
    overwrite = jax.jit(lambda x: jnp.float32(-1) - x, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"device": device, "host": host})
        host[:] = -1
        for _ in range(4):
            device = overwrite(device)
        device.block_until_ready()
        checkpoints.wait()
        tree = checkpoints.latest_good({"device": device, "host": host}).tree
    np.testing.assert_array_equal(np.asarray(tree["device"]), expected)
    np.testing.assert_array_equal(tree["host"], expected)


def test_a_million_parameters_hold_up_training_for_less_than_half_a_second(tmp_path):
    moments = {name: jnp.ones((1000, 1000)) for name in ("params", "mu", "nu")}
    blocked = []
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(3):
            started = time.perf_counter()
            checkpoints.save(step, moments)
            blocked.append(time.perf_counter() - started)
            checkpoints.wait()
    assert min(blocked) < 0.5


def test_a_sharded_tree_is_restored_to_other_shardings(tmp_path):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    sharding = {
        spec: NamedSharding(mesh, PartitionSpec(*spec.split())) for spec in ("data model", "model data", "data", "")
    }
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    codes = (np.arange(64) % 16).reshape(8, 8).astype(ml_dtypes.float8_e4m3)
    tree = {
        "w": jax.device_put(values, sharding["data model"]),
        "codes": jax.device_put(codes, sharding["data"]),
        "scale": jax.device_put(np.float32(2), sharding[""]),
    }
    elsewhere = {"w": sharding["model data"], "codes": sharding["model data"], "scale": sharding[""]}
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree)
        own = checkpoints.latest_good(tree).tree
        moved = checkpoints.latest_good(tree, elsewhere).tree
        gathered = checkpoints.latest_good(tree, one_device).tree
    for got, shardings in (
        (own, jax.tree.map(lambda x: x.sharding, tree)),
        (moved, elsewhere),
        (gathered, jax.tree.map(lambda x: one_device, tree)),
    ):
        for name, leaf in got.items():
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim), name
            assert np.asarray(leaf).tobytes() == np.asarray(tree[name]).tobytes(), name


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert restore(tmp_path / "absent") == (None, [])
    (tmp_path / "7.partial" / "state").mkdir(parents=True)
    assert restore(tmp_path) == (None, [])
    assert names(tmp_path) == []


def test_only_the_newest_are_kept_and_a_step_is_written_once(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 100):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        written = (tmp_path / "100" / "digests.json").stat().st_mtime_ns
        checkpoints.save(100, state(0))
        checkpoints.wait()
        assert checkpoints.steps() == [10, 100]
    assert names(tmp_path) == ["10", "100"]
    assert (tmp_path / "100" / "digests.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_any_damaged_file_is_noticed_and_the_checkpoint_before_is_used(tmp_path):
    pristine = tmp_path / "pristine"
    save_all(pristine, [50, 100])
    files = sorted(p.relative_to(pristine) for p in (pristine / "100").rglob("*") if p.is_file())
    assert Path("100/digests.json") in files
    assert Path("100/metadata.json") in files
    assert len(files) >= 8
    with Checkpoints(tmp_path / "run", warn=(warnings := []).append) as checkpoints:
        for spoil in (flip, truncate, Path.unlink):
            for file in files:
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
                shutil.copytree(pristine, tmp_path / "run")
                spoil(tmp_path / "run" / file)
                warnings.clear()
                restored = checkpoints.latest_good(state(0))
                assert restored.step == 50, (spoil, file)
                assert restored.metadata == {"seen": 50}
                assert identical(restored.tree["w"], state(50)["w"])
                (sentence,) = warnings
                # A byte flipped in a digest looks like one flipped in the file it is of.
                assert file.name in sentence or file.name == "digests.json", (spoil, file)
                assert "checkpoint 100" in sentence
                assert "from step 50" in sentence
                assert names(tmp_path / "run") == ["100.corrupt", "50"]


def test_who_only_restores_leaves_what_is_damaged_and_unfinished_as_it_is(tmp_path):
    save_all(tmp_path, [1, 2])
    flip(tmp_path / "2" / "metadata.json")
    (tmp_path / "3.partial").mkdir()
    with Checkpoints(tmp_path, tidy=False, warn=(warnings := []).append) as checkpoints:
        assert checkpoints.latest_good(state(0)).step == 1
    assert names(tmp_path) == ["1", "2", "3.partial"]
    (sentence,) = warnings
    assert "checkpoint 2" in sentence and sentence.endswith("; step 1 is used")


def test_a_damaged_step_can_be_written_and_damaged_again(tmp_path):
    save_all(tmp_path, [1])
    for aside in ("2.corrupt", "2.corrupt2"):
        save_all(tmp_path, [2])
        flip(tmp_path / "2" / "metadata.json")
        restored, warnings = restore(tmp_path)
        assert restored.step == 1
        assert f"it is now {aside}," in warnings[0]
    assert names(tmp_path) == ["1", "2.corrupt", "2.corrupt2"]


def test_if_none_is_good_the_run_does_not_start_over(tmp_path):
    save_all(tmp_path, [1, 2])
    flip(tmp_path / "1" / "metadata.json")
    truncate(tmp_path / "2" / "metadata.json")
    with pytest.raises(CheckpointError, match=r"1: the SHA-256 of metadata.json differs") as info:
        restore(tmp_path)
    assert "2: metadata.json has" in str(info.value)
    assert "\n" not in str(info.value)
    assert names(tmp_path) == ["1", "2"]
    # What was set aside earlier is a checkpoint, too.
    (tmp_path / "1").rename(tmp_path / "1.corrupt")
    shutil.rmtree(tmp_path / "2")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is good \(1.corrupt\)"):
        restore(tmp_path)


@pytest.mark.parametrize(
    "target, reason",
    [
        ({"w": jnp.zeros((3, 5))}, r"w is float32\[3,4\] there and float32\[3,5\] here"),
        ({"w": jnp.zeros((3, 4), jnp.bfloat16)}, r"w is float32\[3,4\] there and bfloat16\[3,4\]"),
        ({"v": jnp.zeros(3), "w": jnp.zeros((3, 4))}, r"it lacks v\)"),
        ({"v": {"x": jnp.zeros(3)}}, r"it lacks v.x, and 1 more differ"),
        ({}, r"it has w, which this run has not"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_and_kept(tmp_path, target, reason):
    save_all(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=reason) as info:
        checkpoints.latest_good(target)
    assert "--model" in str(info.value)
    assert "--workdir" in str(info.value)
    assert names(tmp_path) == ["1"]


def test_leaves_that_cannot_be_kept_exactly_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"leaf opt.count .* is a int, not an array"):
            checkpoints.save(1, {"opt": {"count": 3}})
        with pytest.raises(TypeError, match=r"leaf rng .* typed PRNG key.*key_data"):
            checkpoints.save(1, {"rng": jax.random.key(0)})
        with pytest.raises(TypeError, match=r"metadata.path is a PosixPath"):
            checkpoints.save(1, state(1), {"path": tmp_path})
        assert checkpoints.steps() == []


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` clean-up runs."""


@pytest.mark.parametrize("moment", ["write_json", "write_digests", "damage", "_remove", "rmtree"])
def test_death_between_any_two_steps_of_a_save_leaves_complete_checkpoints(tmp_path, monkeypatch, moment):
    save_all(tmp_path, [1, 2])

    def die(*args, **kwargs):
        raise Killed

    checkpoints = Checkpoints(tmp_path, keep=2)
    if moment == "rmtree":  # of step 1, halfway

        def half(directory):
            (Path(directory) / "digests.json").unlink()
            raise Killed

        monkeypatch.setattr(steps_module.shutil, "rmtree", half)
    elif moment == "_remove":  # first called before the arrays are written
        real, calls = steps_module._remove, []
        monkeypatch.setattr(
            steps_module,
            "_remove",
            lambda path: die() if calls else calls.append(real(path)),
        )
    else:
        monkeypatch.setattr(steps_module, moment, die)
    checkpoints.save(3, state(3))
    with pytest.raises(Killed):
        checkpoints.wait()
    monkeypatch.undo()

    published = moment in ("damage", "_remove", "rmtree")
    restored, warnings = restore(tmp_path)
    assert warnings == []
    assert restored.step == (3 if published else 2)
    assert identical(restored.tree["w"], state(restored.step)["w"])
    assert not list(tmp_path.glob("*.partial"))
    # The process that takes over goes on saving the steps that were lost.
    save_all(tmp_path, [3, 4])
    assert names(tmp_path) == ["3", "4"]


def test_a_failed_save_is_reported_and_training_goes_on(tmp_path, monkeypatch):
    save_all(tmp_path, [1])
    warnings = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        with monkeypatch.context() as patch:

            def full(directory):
                raise OSError(28, "No space left on device")

            patch.setattr(steps_module, "write_digests", full)
            checkpoints.save(2, state(2))
            with pytest.raises(CheckpointError, match="no space left on device") as info:
                checkpoints.wait()
        assert warnings == [str(info.value)]
        assert "checkpoint of step 2" in warnings[0]
        assert "step 1 is the newest" in warnings[0]
        assert names(tmp_path) == ["1"]
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.latest_good(state(0)).step == 3


def test_a_clock_that_is_set_forward_and_back_gives_up_no_save(tmp_path, monkeypatch):
    now, reads = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: now() + 20 * 365 * 24 * 3600 * (next(reads) % 2))
    save_all(tmp_path, range(1, 6))
    monkeypatch.undo()
    assert next(reads) > 5
    assert names(tmp_path) == ["4", "5"]


def test_the_digests_are_of_the_files(tmp_path):
    import hashlib

    save_all(tmp_path, [1])
    files = json.loads((tmp_path / "1" / "digests.json").read_text())["files"]
    on_disk = {
        path.relative_to(tmp_path / "1").as_posix(): path
        for path in (tmp_path / "1").rglob("*")
        if path.is_file() and path.name != "digests.json"
    }
    assert files.keys() == on_disk.keys()
    for name, path in on_disk.items():
        data = path.read_bytes()
        assert files[name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
