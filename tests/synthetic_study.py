"""A small study on disk that no one trained: four precisions, a control and the noise arm, four seeds each.

The numbers are made up but have the shape of real ones: runs of one seed share most of their noise, FP8 and INT8 have
telemetry of a stack of four blocks, and one run of the control has diverged.
"""

import json
import math
from pathlib import Path

import numpy as np

SEEDS = (0, 1, 2, 3)
STEPS, LOG_EVERY, EVAL_EVERY, TELEMETRY_EVERY = 300, 10, 50, 20
BATCH, LENGTH, DEPTH = 16, 256, 4
ARMS = {
    "bf16": ("baseline", {"precision": "bf16"}),
    "fp32": ("candidate", {"precision": "fp32"}),
    "fp8": ("candidate", {"precision": "fp8"}),
    "int8": ("candidate", {"precision": "int8"}),
    "fp8-unscaled": ("control", {"precision": "fp8-unscaled"}),
    "bf16-perturbed": ("noise", {"precision": "bf16", "init_perturbation": 1e-5}),
}
_OFFSETS = {"fp32": -0.0002, "fp8": 0.0006, "int8": 0.001, "fp8-unscaled": 0.35}
_SPEEDS = {"bf16": 7600, "fp32": 5200, "fp8": 6900, "int8": 8100, "fp8-unscaled": 7000, "bf16-perturbed": 7600}
_FORMATS = {"fp8": ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"), "int8": ("int8", "int8", "int8")}
_LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
_LAYERS = ("blocks/attention/out", "blocks/attention/qkv", "blocks/mlp/down", "blocks/mlp/up")
_FIRST_BINADE, _BINADES = -24, 44
DIVERGED = "fp8-unscaled-seed2"
METRICS = "metrics.jsonl"


def write(folder: Path, arms=tuple(ARMS), seeds=SEEDS, telemetry=("fp8", "int8")) -> Path:
    """Makes the directory of the study; returns it."""
    (folder / "runs").mkdir(parents=True)
    plan = {
        "format": 1,
        "baseline": "bf16",
        "metric": "eval_loss",
        "seeds": list(seeds),
        "arms": [{"name": name, "role": ARMS[name][0], "flags": ARMS[name][1]} for name in arms],
        "flags": {"steps": STEPS},
        "margins": {"parity": 0.25, "strict": 0.1},
    }
    _json(folder / "study.json", plan)
    attempts = []
    for name in arms:
        for seed in seeds:
            run = write_run(folder / "runs" / f"{name}-seed{seed}", name, seed, telemetry=name in telemetry)
            attempts.append(
                {
                    "run": run.name,
                    "started": "2026-01-01T00:00:00+00:00",
                    "seconds": 170.0,
                    "exit": 4 if run.name == DIVERGED else 0,
                    "outcome": "diverged" if run.name == DIVERGED else "finished",
                    "reason": "",
                    "jobs": 1,
                    "others": 0.01,
                    "revision": "0" * 40,
                }
            )
    _lines(folder / "attempts.jsonl", attempts)
    return folder


def write_run(folder: Path, arm: str, seed: int, *, telemetry: bool = False, **flags) -> Path:
    """Makes one run directory; returns it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *arm.encode()])
    shared = np.random.default_rng(seed)
    settings = {"precision": arm, **ARMS.get(arm, ("", {}))[1]}
    _json(folder / "config.json", config(seed=seed, **{**settings, **flags}))
    _json(folder / "env.json", {"sessions": [_session(folder.name)]})
    diverges = folder.name == DIVERGED
    last = 140 if diverges else STEPS
    seed_offset = 0.01 * shared.standard_normal()
    own_offset = 0.0006 * rng.standard_normal() + _OFFSETS.get(arm, 0.0)
    own = 0.0 if arm == "bf16" else 0.003
    lines = []
    for step in range(LOG_EVERY, last + 1, LOG_EVERY):
        loss = 1.55 + 4.0 / (1 + step / 12) + seed_offset + own_offset * step / STEPS
        noise = 0.05 * shared.standard_normal() + own * rng.standard_normal()
        line = {
            "step": step,
            "gradient_norm": 0.2 + 1.5 / (1 + step / 40) + 0.05 * rng.random(),
            "learning_rate": 0.003 * min(step / 30, 1.0),
            "loss": loss + noise,
            "nonfinite_tensors": 0,
            "tokens_per_second": _SPEEDS[arm] * (1 + 0.01 * rng.standard_normal()),
        }
        if step % EVAL_EVERY == 0:
            line["eval_loss"] = loss + 0.02 + 0.3 * own * rng.standard_normal() * (1.2 - step / STEPS)
        if telemetry and step % TELEMETRY_EVERY == 0:
            line |= {
                "attention_logit_max": 4 + step / 50 + rng.random(),
                "log_z": 5.5 + 0.1 * rng.standard_normal(),
                "residual_amax": 3 + step / 30 + rng.random(),
                "update_ratio": 0.02 / (1 + step / 100) + 1e-4 * rng.random(),
            }
        lines.append(line)
    _lines(folder / METRICS, lines)
    if diverges:
        _json(folder / "diverged.json", {"step": 147, "reason": "step 147 is not finite (loss nan, gradient norm nan)"})
    else:
        _json(folder / "summary.json", _summary(arm, lines))
    if telemetry:
        _lines(folder / "telemetry.jsonl", _telemetry(arm, rng, range(TELEMETRY_EVERY, last + 1, TELEMETRY_EVERY)))
    return folder


def write_sensitivity(path: Path, run: str) -> None:
    """A whatif.json, of one layer under two recipes."""
    row = {"layer": "blocks/mlp/up", "depth": 3, "recipe": "fp8", "error": 0.05, "loss_change": -1e-4}
    _json(path, {"run": run, "checkpoint": STEPS, "rows": [row, row | {"recipe": "int8", "error": 0.02}]})


def write_benchmark(path: Path, works: int = 1, **changes) -> None:
    """A benchmark.json, of so many products, each of twice the size, by two contenders."""
    programs = {"flax bf16": {"bytes": 2e6}, "q8jax fp8": {"bytes": 1e6}}
    seconds = {"flax bf16": [0.25, 0.5, 0.75], "q8jax fp8": [0.25, 0.25, 0.25]}
    common = {"devices": 2, "programs": programs, "seconds": seconds}
    measured = [{"work": f"FC{i + 1}", "flops": 4e9 * 2**i, **common} for i in range(works)]
    roofs = {"peaks": {"BF16": 1e13, "FP8": 2e13}, "bandwidth": 1e10, "source": "data sheet"}
    found = {"level": "gemm", "device_kind": "A device", "rounds": 3, "measurements": measured, "roofs": roofs}
    _json(path, found | changes)


def config(**flags) -> dict:
    """A config.json."""
    common = {
        "batch_size": BATCH,
        "seq_len": LENGTH,
        "steps": STEPS,
        "lr": 0.003,
        "warmup": 30,
        "schedule": "cosine",
        "final_lr": 0.0,
        "data": "stdlib",
        "data_sha256": {"train": "a" * 64, "validation": "b" * 64},
        "tokenizer": "bytes",
        "vocab": 256,
        "layers": DEPTH,
        "d_model": 128,
        "init_perturbation": 0.0,
        "precision_schedule": "",
        "recipes": [{"start": 0, "policy": "as the precision says"}],
    }
    return common | flags


def _summary(arm: str, lines: list[dict]) -> dict:
    return {
        "precision": ARMS[arm][1]["precision"],
        "policy": "as the precision says",
        "params": 918656,
        "tokens": STEPS * BATCH * LENGTH,
        "train_loss": lines[-1]["loss"],
        "eval_loss": lines[-1]["eval_loss"] - 0.001,
        "eval_gap_bf16": 0.0,
        "bytes_per_token": 1.0,
        "nonfinite_tensors": 0,
        "tokens_per_second": float(np.median([line["tokens_per_second"] for line in lines])),
        "peak_memory_bytes": 10**9 + _SPEEDS[arm] * 10**4,
    }


def _session(name: str) -> dict:
    return {
        "argv": ["experiments/pretrain.py", f"--workdir={name}"],
        "start_time": "2026-01-01T00:00:00+00:00",
        "python": "3.11.7",
        "versions": {"q8jax": "0.1.0", "jax": "0.10.2", "numpy": "2.4.6"},
        "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
        "cpu": {"model": "A processor", "cores": 2},
    }


def _telemetry(arm: str, rng: np.random.Generator, steps: range) -> list[dict]:
    formats = dict(zip("xwg", _FORMATS[arm]))
    return [
        {
            "step": step,
            "dots": {layer: _dot(i, formats, step, rng) for i, layer in enumerate(_LAYERS)},
            "formats": dict.fromkeys(_LAYERS, formats),
            "first_binade": _FIRST_BINADE,
        }
        for step in steps
    ]


def _dot(layer: int, formats: dict[str, str], step: int, rng: np.random.Generator) -> dict:
    tensors = {tensor: _statistics(layer, tensor, qtype, step, rng) for tensor, qtype in formats.items()}
    for i, gemm in enumerate(("fwd", "dlhs", "drhs")):
        error = [0.02 * (1 + i) * (1 + 0.1 * depth) * math.exp(0.1 * rng.standard_normal()) for depth in range(DEPTH)]
        tensors[gemm] = {
            "cosine": [1 - e * e / 2 for e in error],
            "error": error,
            "bias": [e / 10 for e in error],
            "variance": [0.99 * e * e for e in error],
        }
    return tensors


def _statistics(layer: int, tensor: str, qtype: str, step: int, rng: np.random.Generator) -> dict:
    center = {"x": 1.0, "w": -4.0, "g": -14.0}[tensor] + layer / 2
    found: dict[str, list] = {name: [] for name in ("amax", "scale", "staleness", "saturation", "underflow", "sqnr")}
    found |= {"kurtosis": [], "binades": []}
    for depth in range(DEPTH):
        log_amax = center + 3 + 0.4 * depth + step / 200 + 0.3 * rng.standard_normal()
        staleness = 2.0 ** (-0.4 + 0.3 * rng.standard_normal())
        scale = 2.0 ** math.ceil(log_amax + 0.4 - math.log2(_LARGEST[qtype]))
        found["amax"].append(2.0**log_amax)
        found["scale"].append(scale)
        found["staleness"].append(staleness)
        found["saturation"].append(max(0.0, staleness - 1) * 1e-4)
        found["underflow"].append(10 ** (-4 + layer / 2 + 0.2 * rng.standard_normal()) if tensor == "g" else 0.0)
        found["sqnr"].append(31.5 - 3 * (tensor == "g") - depth * layer / 2 + 0.4 * rng.standard_normal())
        found["kurtosis"].append(3 + rng.random())
        # Of a normal distribution, cut off at its largest value, 4 standard deviations.
        edges = np.arange(_FIRST_BINADE, _FIRST_BINADE + _BINADES + 1) - (log_amax - math.log2(scale) - 2)
        below = np.array([math.erf(min(2.0**edge, 4.0) / math.sqrt(2)) for edge in edges])
        found["binades"].append(np.round(1e6 * np.diff(below)).astype(int).tolist())
    return found


def _json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
