"""What the README shows, runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import q8jax
from experiments import options
from experiments.pretrain import FLAGS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def run_python(heading: str) -> dict:
    """Runs the code block under a heading as a reader would, with JAX's own defaults."""
    section = README.partition(f"\n{heading}\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    namespace: dict = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), namespace)
    return namespace


def test_library_example_quantizes_and_differentiates():
    shown = run_python("## The library")
    assert shown["xq"].qvalue.dtype == jnp.float8_e4m3fn
    assert 30 < q8jax.stats.sqnr(shown["x"], shown["xq"]) < 33
    exact = 2 * (shown["x"] @ shown["w"]) @ shown["w"].T
    error = float(jnp.linalg.norm(shown["dx"] - exact) / jnp.linalg.norm(exact))
    assert 0.02 < error < 0.1  # below: not quantized at all
    jaxpr = str(jax.make_jaxpr(jax.grad(shown["loss"]))(shown["x"], shown["w"]))
    assert "f8_e4m3fn" in jaxpr


def test_nnx_example_trains_and_leaves_the_parameters_interchangeable():
    shown = run_python("### A Flax NNX model")
    assert shown["losses"][-1] < 0.2 * shown["losses"][0]
    model, plain = shown["model"], shown["Mlp"](nnx.Rngs(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(model, nnx.Param), nnx.state(plain, nnx.Param))
    up, down = (state.recipe for state in q8jax.nnx.scaling_states(model).values())
    assert {up, down} == {q8jax.PRECISIONS["fp8"].recipe, q8jax.PRECISIONS["int8"].recipe}
    exact = plain.__class__(nnx.Rngs(0))
    nnx.update(exact, nnx.state(model, nnx.Param))
    error = jnp.max(jnp.abs(model(shown["x"]) - exact(shown["x"])))
    assert 1e-4 < error < 0.5


def test_linen_example_trains_and_keeps_its_scales():
    shown = run_python("### A Flax Linen model")
    assert shown["losses"][-1] < 0.2 * shown["losses"][0]
    scaling = shown["state"].params["_overwrite_with_gradient"]
    chex.assert_tree_all_finite(scaling)
    histories = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(scaling) if "history" in str(path)]
    assert len(histories) == 2
    for history in histories:
        assert (history > 0).all()  # calibrated, then observed in every one of the thirty steps


def table_rows() -> dict[str, str]:
    section = README.partition("\n## Precisions\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \|(.*)$", section, re.MULTILINE))


def test_precision_table_has_every_preset_and_its_source():
    rows = table_rows()
    assert set(rows) == set(q8jax.PRECISIONS)
    for name, precision in q8jax.PRECISIONS.items():
        papers = re.findall(r"arXiv:[\d.]+\d", precision.source)
        assert not papers or any(paper in rows[name] for paper in papers), name


def test_flag_table_names_real_flags_and_their_defaults():
    section = README.partition("\n## The flags that matter\n")[2].partition("\n## ")[0].partition("\n\n|")[2]
    shown = program("--help").stdout
    named = set(re.findall(r"--(\w+)", section))
    assert len(named) > 15
    assert named <= set(re.findall(r"--(?:\[no\])?(\w+)", shown))
    examples = {"precision_schedule", "mesh", "workdir", "config", "telemetry", "remat_keeps"}
    defaults = {flag for flag, name in re.findall(r"(--(\w+)=\w+)", section) if name not in examples}
    assert len(defaults) == 9
    for flag in defaults:
        assert re.search(rf"{flag}\b", shown), flag


def test_every_flag_of_the_flag_table_is_accepted_by_itself():
    section = README.partition("\n## The flags that matter\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `(--\w+=?[^`]*)` \|", section, re.MULTILINE)
    assert len(shown) > 10
    for flags in shown:
        options.parse(["pretrain", *flags.split()])
        if not FLAGS.config:  # a file that the reader has
            options.from_flags()


def program(*arguments: str, module: str = "experiments.pretrain", check: bool = True) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check)


def shell_lines() -> list[str]:
    """The commands under 'Two commands', without their set-up."""
    section = README.partition("\n## Two commands\n")[2].partition("\n## ")[0]
    return [block.split(" && ")[-1] for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL)]


def test_the_two_commands_are_one_line_each_and_the_only_shell_blocks():
    # .ci/run takes them from here, by their order.
    assert README.count("```sh") == 2
    main, tests = shell_lines()
    assert main.count("\n") == tests.count("\n") == 1
    assert shlex.split(main)[:3] == [".venv/bin/python", "-m", "experiments.pretrain"]
    assert shlex.split(tests)[:3] == [".venv/bin/python", "-m", "pytest"]


@pytest.mark.slow
def test_main_command_reaches_what_the_readme_promises(tmp_path):
    """The default run, whole: under 2 nats per byte in under 3 GB."""
    program("--precision=fp8", f"--workdir={tmp_path / 'run'}", f"--cache_dir={tmp_path / 'cache'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["precision"] == "fp8"
    assert summary["params"] < 1_000_000
    assert 1 < summary["eval_loss"] < 2.0
    assert abs(summary["eval_gap_bf16"] / summary["eval_loss"]) < 0.05
    assert summary["peak_memory_bytes"] < 3e9
    assert summary["nonfinite_tensors"] == 0
    also = "tokens train_loss tokens_per_second step_ms compile_seconds flops mfu joules_per_token checkpoint_share"
    assert set(also.split()) <= set(summary)
    assert summary["input_wait"] < 0.01


@pytest.mark.slow
def test_plan_shows_every_gemm():
    names = ("fp8", "fp8-block", "mxfp8", "int8", "int8-switchback", "bf16")
    schedule = ",".join(f"{step}:{name}" for step, name in enumerate(names))
    plans = program(f"--precision_schedule={schedule}", "--print_plan").stdout.split("\n\n")
    for name, plan in zip(names, plans, strict=True):
        assert plan.startswith(f"precision {name} ")
        for layer in ("attention/qkv", "attention/out", "mlp/up", "mlp/down"):
            assert len(re.findall(rf"^blocks/{layer} .*\b(?:fwd|dlhs|drhs)\b", plan, re.MULTILINE)) == 3, plan


@pytest.mark.slow
def test_list_prints_every_preset():
    printed = program("--precision=list").stdout
    for name, precision in q8jax.PRECISIONS.items():
        assert f"{name}\n" in printed and str(precision.recipe) in printed


@pytest.mark.slow
def test_a_reader_that_stops_reading_is_no_error():
    command = [sys.executable, "-m", "experiments.pretrain", "--precision=list"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.slow
def test_sqnr_table_orders_the_formats_as_the_readme_does():
    rows = [line.split("|")[1:-1] for line in program("--draws=3", module="experiments.sqnr").stdout.splitlines()[2:]]
    on_normal = {row[0].strip(): float(row[1].split()[0]) for row in rows}
    assert on_normal["INT8 1×128"] > on_normal["INT8 tensor"] > on_normal["E4M3 tensor"] > on_normal["E5M2 tensor"] > 20
