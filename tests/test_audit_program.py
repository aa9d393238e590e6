"""The program experiments.audit, on this machine."""

import functools
import json
import re
from types import SimpleNamespace

import pytest
from chips import chips

import q8jax
from experiments import audit, options, pretrain  # noqa: F401  (pretrain defines the flags that audit shares)
from experiments.projecting.projection import Projection
from experiments.targets import Target

STEP = ("--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--mesh=data:1")
audit.define_flags()


def run(*arguments):
    for name in ("target", "search", "json", "vocab"):
        options.FLAGS[name].unparse()
    options.parse(["audit.py", *arguments])
    return audit.main([])


@pytest.mark.slow
def test_a_table_for_people_and_an_object_for_programs(capsys):
    assert run(*STEP, "--precision=fp8", "--target=cpu") == 0
    table = capsys.readouterr().out
    assert table.startswith("fp8 on 1 × cpu, batch 8 × 16\n")
    assert all(path in table for path in ("blocks/attention/qkv", "blocks/mlp/down", "head"))
    assert run(*STEP, "--precision=fp8", "--json", "--vocab=64") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"gemms", "bytes", "kernels", "temp_bytes", "collectives", "estimated_cycles"} <= set(found)
    head = next(gemm for gemm in found["gemms"] if gemm["path"] == "head" and gemm["role"] == "fwd")
    assert head["flops"] == 2 * 8 * 16 * 32 * 64


def test_the_exit_code_is_3_where_something_is_not_what_was_asked(monkeypatch, capsys):
    monkeypatch.setattr(q8jax, "audit", functools.partial(q8jax.audit, asked="fp8"))
    assert run(*STEP, "--precision=bf16") == audit.NOT_AS_ASKED == 3
    assert re.search(r"float(32|16) instead of float8_e4m3fn, which it was never rounded to", capsys.readouterr().out)


@pytest.mark.slow
def test_auto_is_what_the_target_rewards(capsys):
    assert run(*STEP, "--precision=auto") == 0
    assert capsys.readouterr().out.startswith(f"{q8jax.recommend('cpu').precision} on 1 × cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--target=h1000"],
            "--target=h1000 must be local, cpu, a100, h100, h200, b200, or a TPU slice such as v5e:2x2",
        ),
        (["--target=v5e"], "--target=v5e must be local"),
        (["--precision=fp9"], "--precision=fp9: Unknown precision 'fp9'"),
        (["--precision_schedule=0:bf16,5:fp8"], "--precision_schedule has more than one step to audit"),
        (["--mesh=data:3"], "--mesh=data:3 does not divide the 8 rows"),
        (["--target=cpu", "--search"], "--search needs a target whose memory is known, not --target=cpu"),
        (["--remat", "--remat_keeps=all"], "Unknown --remat_keeps 'all'"),
    ],
)
def test_what_cannot_be_audited_is_said_in_a_sentence(arguments, message, capsys):
    assert run(*STEP[:-1], *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"audit: {message}") and error.count("\n") == 1


def test_a_flag_that_does_not_parse_names_the_program(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--taget=cpu")
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("audit: Unknown command line flag 'taget'")


@pytest.fixture
def compiles(monkeypatch):
    """Lets a step take 6 GiB for each row where nothing is computed again, 2 where products are kept, 1 otherwise."""
    tried = []

    def compiled(goal):
        flags = options.FLAGS
        rows = flags.batch_size // (2 * flags.accumulate)
        each = {(False, "nothing"): 6, (True, "products"): 2, (True, "nothing"): 1}[flags.remat, flags.remat_keeps]
        tried.append((flags.remat, flags.remat_keeps, rows))
        if each * rows > 18:
            raise audit._NoRoom("there is no room.")
        seconds = rows * (1.5 if flags.remat_keeps == "nothing" and flags.remat else 1.1 if flags.remat else 1.0) + 1
        projection = Projection(each * rows * 2**30, 15 * 2**30, 0.0, 0.0, seconds, 0.0, 1.0, rows, 1.0)
        report = SimpleNamespace(ok=True, table=lambda: "", to_json=lambda: "{}")
        return audit.Audited(SimpleNamespace(), report, projection)

    monkeypatch.setattr(audit, "_compiled", compiled)
    monkeypatch.setattr(audit, "target", lambda name: Target(chips("TPU v5 lite", 4), {}))
    monkeypatch.setattr(audit.Audited, "title", "a step")
    return tried


def test_the_search_chooses_what_trains_most_tokens_a_second(compiles, capsys):
    size = ("--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--mesh=fsdp:2,tensor:2")
    assert run(*size, "--target=v5e:2x2", "--search", "--accumulate=3", "--precision=fp8") == 0
    said = capsys.readouterr().err
    # 2 rows a second and a half, 7 rows in 8.7 seconds, 15 rows in 23.5.
    assert "search: chosen is --batch_size=42 --remat --remat_keeps=products" in said
    assert "search: --batch_size=18 --noremat: does not fit" in said
    assert compiles[-1] == (True, "products", 7)
    assert {(False, "nothing", 2), (True, "products", 7), (True, "nothing", 15)} <= set(compiles)


def test_the_search_leaves_nothing_that_was_said_unsaid(compiles, capsys):
    assert run("--target=v5e:2x2", "--search", "--batch_size=8") == 1
    assert "--search chooses --batch_size, --remat and --remat_keeps: leave them out." in capsys.readouterr().err
