"""Flags: what they resolve to, what is refused and in which words."""

import json
from pathlib import Path

import pytest

from experiments import options, pretrain  # importing pretrain defines the flags
from experiments.models.config import SIZES
from experiments.runs.config import config_differences


def read(*arguments, config=None):
    options.parse(["pretrain", *arguments])
    return options.from_flags(config)


def test_the_default_run():
    chosen = read()
    assert chosen.precision == chosen.label == "fp8"
    assert chosen.model == SIZES["tiny"]
    assert (chosen.steps, chosen.batch_size, chosen.seq_len, chosen.warmup, chosen.seed) == (200, 16, 256, 20, 0)
    assert [phase.start for phase in chosen.phases] == [0]
    assert chosen.profile is None
    assert str(chosen.workdir) == "runs/tiny-fp8-seed0"


@pytest.mark.parametrize(
    ("devices", "arguments", "rows"),
    [(8, [], 16), (24, [], 24), (256, [], 256), (8, ["--accumulate=4"], 32), (24, ["--batch_size=16"], 16)],
)
def test_there_is_a_row_for_each_device_unless_the_batch_is_given(devices, arguments, rows):
    read(*arguments)
    assert options.fit_batch(devices) == (rows != 16)
    assert options.from_flags().flags["batch_size"] == rows


def test_flags_of_one_command_line_do_not_stay_for_the_next():
    assert read("--steps=7", "--model=small").steps == 7
    assert read().flags == read().flags
    assert read().steps == 200


def test_dimensions_override_the_size():
    chosen = read("--model=small", "--layers=3", "--heads=12", "--d_ff=64", "--activation=gelu", "--tied", "--remat")
    model = chosen.model_with(100)
    assert (model.layers, model.d_model, model.heads, model.kv_heads, model.d_ff) == (3, 384, 12, 12, 64)
    assert (model.activation, model.tied, model.remat, model.vocab) == ("gelu", True, True, 100)
    assert read("--model=8b").model.kv_heads == 8
    assert read("--model=8b", "--heads=16", "--kv_heads=2").model.kv_heads == 2
    assert not read("--model=124m", "--notied").model.tied


def test_config_holds_every_flag_resolved():
    resolved = {"mesh": "data:4", "tokenizer": "bytes", "vocab": 256, "data_sha256": {"train": "ab"}}
    config = read("--precision_schedule=0:bf16,50%:fp8").config(**resolved)
    json.dumps(config)
    assert {"precision", "model", "data", "tokenizer", "steps", "batch_size", "seq_len", "seed"} <= set(config)
    assert {"mesh", "accumulate", "log_every", "eval_every", "checkpoint_every"} <= set(config)
    assert not {"workdir", "config", "print_plan"} & set(config)
    assert None not in config.values()
    assert (config["layers"], config["warmup"], config["decay"]) == (4, 20, 0.2)
    assert [recipe["start"] for recipe in config["recipes"]] == [0, 100]
    assert all("fwd=" in recipe["policy"] for recipe in config["recipes"])
    assert {name: config[name] for name in resolved} == resolved


RESOLVED = {"mesh": "data:1", "tokenizer": "bytes", "vocab": 256, "data_sha256": {}}


def config_of(*arguments, **resolved):
    return json.loads(json.dumps(read(*arguments).config(**RESOLVED | resolved)))


ORIGINAL = ("--model=small", "--layers=2", "--heads=2", "--kv_heads=1", "--precision=int8", "--quantize=head,blocks")


def test_a_config_repeats_its_flags():
    config = config_of(*ORIGINAL, "--steps=20", "--schedule=wsd", "--decay=0.5", "--lr=1e-3", "--deterministic")
    again = read("--config=x.json", "--workdir=y", config=config)
    assert again.config(**RESOLVED) == config
    assert options.repeats_config()
    assert again.flags["deterministic"] is True


def test_flags_that_are_newer_than_a_run_do_not_part_it_from_its_config():
    found = sorted((Path(__file__).parents[1] / "results").glob("*/runs/bf16-seed*/config.json"))
    assert found
    for path in found:
        stored = json.loads(path.read_text())
        resolved = {name: stored[name] for name in RESOLVED}
        again = read("--config=x.json", config=stored).config(**resolved)
        assert not config_differences(stored, json.loads(json.dumps(again)), options.MAY_CHANGE), path
    assert config_of(*ORIGINAL, "--remat", "--remat_keeps=products")["remat_keeps"] == "products"


def test_flags_beside_a_config_win():
    config = config_of(*ORIGINAL, "--precision_schedule=", "--steps=20")
    chosen = read("--config=x.json", "--steps=30", "--kv_heads=2", config=config)
    assert (chosen.steps, chosen.model.kv_heads, chosen.model.layers, chosen.precision) == (30, 2, 2, "int8")
    assert not options.repeats_config()
    assert read("--config=x.json", "--model=8b", config=config).model == SIZES["8b"]
    assert read("--config=x.json", "--heads=4", config=config).model.kv_heads == 4


def test_steps_beside_a_config_bring_their_own_warmup():
    config = config_of("--steps=100", "--profile_steps=20:30")
    chosen = read("--config=x.json", "--steps=8", config=config)
    assert (chosen.steps, chosen.warmup, chosen.profile) == (8, 0, None)
    assert read("--config=x.json", "--steps=8", "--warmup=3", config=config).warmup == 3
    assert read("--config=x.json", "--lr=1e-3", config=config).warmup == 10


def test_what_was_resolved_gives_way_to_what_it_was_resolved_from():
    config = config_of(mesh="data:8")
    repeated = read("--config=x.json", config=config)
    assert (repeated.mesh, repeated.tokenizer) == ("data:8", "bytes")
    assert read("--config=x.json", "--batch_size=4", config=config).mesh == "auto"
    assert read("--config=x.json", "--accumulate=4", config=config).mesh == "auto"
    assert read("--config=x.json", "--data=markov", config=config).tokenizer == "auto"
    assert read("--config=x.json", "--data=a.txt", config=config_of(tokenizer="bpe:300")).tokenizer == "bpe:300"


def test_a_precision_beside_a_config_wins_over_its_schedule():
    config = config_of("--precision_schedule=0:bf16,100:fp8")
    assert read("--config=x.json", config=config).label == "0:bf16,100:fp8"
    assert read("--config=x.json", "--precision=int8", config=config).label == "int8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "many"}, "^--config=x.json gives steps the value 'many', which must be a whole number: repair it.$"),
        ({"lr": None}, "gives lr the value None, which must be a number"),
        ({"tied": "perhaps"}, "gives tied the value 'perhaps', which must be true or false"),
        ({"data": 3}, "gives data the value 3, which must be text"),
        ({"stepps": 3}, "Unknown entry in --config=x.json 'stepps' .did you mean 'steps'"),
        ({"steps": 0}, "^--steps=0 must be at least 1"),
    ],
)
def test_a_config_with_bad_values_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read("--config=x.json", config=config_of() | change)


@pytest.mark.parametrize("config", [{}, {"name": "some-package", "version": 1}])
def test_another_programs_json_is_refused(config):
    with pytest.raises(ValueError, match="does not hold the flags of a run: give the config.json of one"):
        read("--config=x.json", config=config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "^--steps=0 must be at least 1.$"),
        (["--log_every=0"], "^--log_every=0 must be at least 1.$"),
        (["--keep_checkpoints=0"], "^--keep_checkpoints=0 must be at least 1.$"),
        (["--seed=-1"], "^--seed=-1 must be at least 0.$"),
        (["--accumulate=3"], "^--accumulate=3 must divide --batch_size=16.$"),
        (["--steps=10", "--warmup=10"], "^--warmup=10 must be at least 0 and below --steps=10.$"),
        (["--lr=nan"], "^--lr=nan must be positive and finite.$"),
        (["--clip=0"], "^--clip=0.0 must be positive and finite.$"),
        (["--clip=inf"], "^--clip=inf must be positive and finite.$"),
        (["--final_lr=nan"], "^--final_lr=nan must be from 0 to 1.$"),
        (["--schedule=wsd", "--decay=nan"], "^--decay=nan must be from 0 to 1.$"),
        (["--b1=1"], "^--b1=1.0 must be at least 0 and below 1.$"),
        (["--b2=1"], "^--b2=1.0 must be at least 0 and below 1.$"),
        (["--b2=nan"], "^--b2=nan must be at least 0 and below 1.$"),
        (["--weight_decay=-1"], "^--weight_decay=-1.0 must be finite and not negative.$"),
        (["--weight_decay=nan"], "^--weight_decay=nan must be finite and not negative.$"),
        (["--weight_decay=inf"], "^--weight_decay=inf must be finite and not negative.$"),
        (["--rope_theta=nan"], "^--rope_theta=nan must be finite and at least 1.$"),
        (["--rope_theta=inf"], "^--rope_theta=inf must be finite and at least 1.$"),
        (["--rope_theta=0"], "^--rope_theta=0.0 must be finite and at least 1.$"),
        (["--rope_theta=-1"], "^--rope_theta=-1.0 must be finite and at least 1.$"),
        (["--seed=4294967296"], "^--seed=4294967296 must be at most 4294967295.$"),
        (["--steps=99999999999999999999999"], "^--steps=9{23} must be at most 2147483647.$"),
        (["--d_ff=99999999999999999999999"], "^--d_ff=9{23} must be at most 2147483647.$"),
        (["--schedule=cosin"], "^Unknown --schedule 'cosin' .did you mean 'cosine'"),
        (["--decay=0.3"], "^--decay has no effect on --schedule=cosine: leave it out, or use wsd.$"),
        (["--model=tinny"], "^Unknown --model 'tinny' .did you mean 'tiny'.*8b.$"),
        (["--activation=swigle"], "^Unknown --activation 'swigle' .did you mean 'swiglu'"),
        (["--heads=5"], "^--heads=5 must divide --d_model=128"),
        (["--kv_heads=3"], "^--kv_heads=3 must divide --heads=2"),
        (["--precision=fp9"], "^--precision=fp9: Unknown precision"),
        (["--precision_schedule=0:fp8,400:bf16"], "^--precision_schedule=0:fp8,400:bf16: .*--steps=200"),
        (["--precision=fp8", "--precision_schedule=0:fp8"], "both say the precision: give one of them"),
        (["--quantize=heads"], "--quantize=heads must list some of blocks, head, attention"),
        (["--profile_steps=3"], "^--profile_steps=3 must be FIRST:LAST"),
        (["--profile_steps=5:3"], "^--profile_steps=5:3 must be FIRST:LAST"),
        (["--profile_steps=5:300"], "<= --steps=200"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        read(*arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=abc", "pretrain: --steps=abc must be a whole number.\n"),
        ("--lr=fast", "pretrain: --lr=fast must be a number.\n"),
        ("--tied=maybe", "pretrain: --tied=maybe must be true or false.\n"),
        (
            "--stepps=3",
            "pretrain: Unknown command line flag 'stepps' (did you mean --steps?): --help lists the flags.\n",
        ),
        ("--steps", "pretrain: Missing value for flag --steps: --help lists the flags.\n"),
        ("fp8", "pretrain: Unexpected argument 'fp8', where a flag is written --name=value: --help lists the flags.\n"),
    ],
)
def test_a_command_line_that_does_not_parse(argument, message, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(["pretrain", argument])
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", message)


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(["pretrain", "--help"], pretrain.__doc__)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Pretrains a language model: python -m experiments.pretrain --precision=fp8\n")
    for flag in (
        "--precision=fp8 ",
        "--model=tiny ",
        "--steps=200 ",
        "--workdir= ",
        "--[no]print_plan ",
        "--quantize=blocks ",
    ):
        assert f"\n  {flag}" in shown
    assert max(map(len, shown.splitlines())) < 120
    positions = [shown.index(f"\n{title}:\n") for title in ("Precision", "Model", "Data", "Training", "Run")]
    assert positions == sorted(positions)
