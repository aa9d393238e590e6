"""A search of mixed precision for a model and its data; see `search`."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.models.kinds import policy_of as policy_for
from experiments.quantizing import search
from experiments.quantizing.options import Options
from experiments.quantizing.pipeline import Plan, quantize_for_inference
from experiments.quantizing.schemes import named, schemes_of
from experiments.quantizing.search import Budget, Option
from experiments.quantizing.sources import Source
from q8jax.nnx.layers import layers_of
from q8jax.policy import Policy
from q8jax.report import aligned

_TRIES = 4


def find(chosen: Options, source: Source) -> tuple[Policy, list[str]]:
    """The policy that meets --budget, and a table of what led to it.

    Raises:
      ValueError: a candidate that is misspelt, or a budget that no choice meets.
    """
    budget = chosen.budget
    assert budget is not None
    tell = lambda line: print(line, file=sys.stderr, flush=True)
    run = lambda model, batch: source.head.logits(model, batch)
    damage = _damage(source)
    options: list[Option] = []
    recipes = {}
    floating: dict[str, int] = {}
    for candidate in chosen.candidates.split("+"):
        policy = policy_for(source.kind, named(candidate, source.compute), tuple(chosen.quantize))
        recipes[candidate] = policy.rules[0][1]
        schemes = schemes_of(policy, source.model(), chosen.weights, chosen.inputs, chosen.scales)
        plan = Plan(schemes, {}, chosen.method, chosen.calibration)
        quantized, plain = source.model(), source.model()
        quantize_for_inference(quantized, plan, run, source.calibration, lambda line: None)
        layers = layers_of(source.model())
        tell(f"what {candidate} costs each of {len(schemes)} layers")
        for path, (size, lost) in search.damages(plain, quantized, damage).items():
            options.append(Option(path, candidate, size, lost))
            floating[path] = 4 * layers[path].kernel[...].size
    options += [Option(path, "", size, 0.0) for path, size in floating.items()]
    whole = sum(floating.values())
    limit, measured = budget.limit, None
    for _ in range(_TRIES):
        picked = search.choose(options, Budget(budget.kind, limit), whole)
        policy = search.policy_of(picked, recipes, source.compute)
        measured = _measured(chosen, source, policy, damage)
        if budget.kind == "size" or measured <= budget.limit:
            break
        # Damages did not add up.
        limit *= budget.limit / measured * 0.9
    rows = [("layer", "candidate", "bytes", "damage", "chosen")]
    for option in sorted(options, key=lambda o: (o.path, o.bytes)):
        mark = "*" if picked[option.path] == option else ""
        rows.append((option.path, option.candidate or "float", f"{option.bytes:,}", f"{option.damage:.2e}", mark))
    size = sum(option.bytes for option in picked.values())
    lost = sum(option.damage for option in picked.values())
    lines = aligned(rows)
    lines += ["", f"{size / whole:.3f} of float32 kernels, damage {lost:.2e} by layers, {measured:.2e} as a whole"]
    return policy, lines


def _measured(chosen: Options, source: Source, policy: Policy, damage: Any) -> float:
    schemes = schemes_of(policy, source.model(), chosen.weights, chosen.inputs, chosen.scales)
    model = source.model()
    run = lambda model, batch: source.head.logits(model, batch)
    plan = Plan(schemes, {}, chosen.method, chosen.calibration)
    quantize_for_inference(model, plan, run, source.calibration, lambda line: None)
    return damage(*nnx.split(model))


def _damage(source: Source) -> Any:
    """How much worse a model is than the float one on calibration batches: loss in nats, or 1 less the cosine."""
    batches = [source.head.of(dict(batch)) for batch in source.calibration]

    def outputs(graphdef: Any, state: Any) -> Any:
        return _program(source.head, graphdef)(state, batches)

    reference = outputs(*nnx.split(source.model()))

    def damage(graphdef: Any, state: Any) -> float:
        found = outputs(graphdef, state)
        if source.purpose.task == "sentence-embedding":
            return search.outputs_differ(reference, found)
        return float(np.mean(found) - np.mean(reference))

    return damage


def _program(head: Any, graphdef: Any) -> Any:
    key = head, graphdef
    if key not in _PROGRAMS:

        @jax.jit
        def one(state, batch):
            logits = head.logits(nnx.merge(graphdef, state), batch)
            if head.purpose.task == "sentence-embedding":
                return logits[0]
            nats, count = head.loss(logits, batch)
            return nats / count

        _PROGRAMS[key] = one
    return lambda state, batches: [np.asarray(_PROGRAMS[key](state, batch)) for batch in batches]


_PROGRAMS: dict[Any, Any] = {}
