"""The notebook runs from top to bottom, and is committed without what it printed."""

import json
from pathlib import Path

import matplotlib
import pytest
import synthetic_study

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "runs.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.parametrize("telemetry", [("fp8",), ()])
def test_cells_run_on_a_study(tmp_path, monkeypatch, capsys, telemetry):
    study = synthetic_study.write(tmp_path / "study", arms=("bf16", "fp8", "fp8-unscaled"), telemetry=telemetry)
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.syspath_prepend("..")
    names = {}
    with matplotlib.rc_context({"backend": "agg"}):
        for code in CODE:
            exec(code.replace("../results/tiny", str(study)), names)
    assert len(names["runs"]) == 12 and names["difference"]["bf16"].abs().max() == 0
    assert names["difference"]["fp8-unscaled"].count() == 3 and names["difference"]["fp8"].mean() < 0.2
    assert list(names["curves"].columns) == ["bf16", "fp8", "fp8-unscaled"]
    assert ("mlp/up" in capsys.readouterr().out) == bool(telemetry)


def test_no_output_is_committed():
    for cell in CELLS:
        assert not cell.get("outputs") and not cell.get("execution_count")
