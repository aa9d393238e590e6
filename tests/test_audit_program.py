"""The program experiments.audit, on this machine."""

import functools
import json
import re

import pytest

import q8jax
from experiments import audit, options, pretrain  # noqa: F401  (pretrain defines the flags that audit shares)

STEP = ("--layers=1", "--d_model=32", "--heads=2", "--d_ff=32", "--seq_len=16", "--batch_size=8", "--mesh=data:1")
audit.define_flags()


def run(*arguments):
    for name in ("target", "json", "vocab"):
        options.FLAGS[name].unparse()
    options.parse(["audit.py", *arguments])
    return audit.main([])


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
