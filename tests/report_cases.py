"""A small report of everything that a report can have, with text that means harm."""

from experiments.plots.plot import Plot, Table

HOSTILE = """</script><!--<script>alert("1")</script> & 'é'"""
# In the words of matplotlib: ids, references to them, a style sheet for everything, metadata, Base64 in lines.
SVG = b"""<?xml version="1.0" encoding="utf-8" standalone="no"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="360pt" height="180pt" viewBox="0 0 360 180"
  xmlns="http://www.w3.org/2000/svg" version="1.1">
 <metadata>
  <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><date>2026</date></rdf:RDF>
 </metadata>
 <defs>
  <style type="text/css">*{stroke-linejoin: round; stroke-linecap: butt}</style>
 </defs>
 <g id="figure_1">
  <path d="M 0 0 L 360 0 L 360 180 L 0 180 z" style="fill: #ffffff"/>
  <defs><path id="tick" d="M 0 0 L 0 9" style="stroke: #000000"/></defs>
  <use xlink:href="#tick" x="60" y="150"/>
  <path d="M 20 20 L 340 150" clip-path="url(#box)" style="fill: none; stroke: #0072b2; stroke-width: 3"/>
  <path d="M 20 90 L 90 90 L 90 20 z" style="fill: url(#hatch); opacity: 0.5"/>
  <image xlink:href="data:image/png;base64,
iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk
YPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==" x="250" y="20" width="60" height="60"/>
  <text x="100" y="170" style="font: 10px 'DejaVu Sans', sans-serif">steps &lt; 100 <tspan>and more</tspan></text>
 </g>
 <defs>
  <clipPath id="box"><rect x="10" y="10" width="340" height="150"/></clipPath>
  <pattern id="hatch" width="8" height="8" patternUnits="userSpaceOnUse"><path d="M 0 0 L 8 8"/></pattern>
 </defs>
</svg>
"""
RUNS = tuple(f"{arm}-seed{seed}" for arm in ("bf16", "fp8") for seed in range(8))
# More than are shown at once, and neither text nor numbers sorted.
NUMBERS = tuple(
    {"arm": run.split("-")[0], "run": run, "step": step, "loss": 4 - step / 1000 + 0.1 / 3 * (i % 3)}
    for i, run in enumerate(RUNS)
    for step in range(1000, 0, -100)
)
CURVES = Plot("loss_tokens", "Loss against tokens", "Mean of 8 seeds.", RUNS, NUMBERS, SVG)
MEANS = Plot(
    "difference.fp8",
    f"Difference {HOSTILE}",
    f"Bands {HOSTILE}",
    (HOSTILE, *RUNS),
    (
        {"arm": HOSTILE, "runs": [HOSTILE, *RUNS], "mean": 0.5},
        {"arm": "fp8", "runs": list(RUNS), "mean": None},
        {"arm": "int8", "runs": ["int8-seed0"], "mean": float("nan")},
    ),
    SVG,
)
TABLE = Table(
    "headline",
    "Difference to BF16",
    f"Paired {HOSTILE}",
    ("precision", "delta (%)", "90 % interval", "seeds", "verdict", *(f"further column {i}" for i in range(6))),
    (
        ("fp8", 0.0123456789, "[−0.01, 0.03]", 8, "strict parity", *range(6)),
        (HOSTILE, float("inf"), None, 8, "not enough evidence: about 14 seeds would settle it", *range(6)),
    ),
    (RUNS, (HOSTILE,)),
)
PROVENANCE = {
    "command": f"python -m experiments.figures {HOSTILE}",
    "data_sha256": {"train": "a" * 64},
    "files": {},
    "versions": {"matplotlib": "3.10", "jax": "0.10.2"},
    "runs": {
        run: {"precision": run.split("-")[0], "revision": "7" * 40, "files": {"metrics.jsonl": 8 * "0"}}
        for run in (*RUNS, HOSTILE)
    },
}
MISSING = [f"fp8-seed7 is still running {HOSTILE}"]
REPORT = ("Four precisions", [CURVES, MEANS], [TABLE], PROVENANCE, MISSING)
