"""Which room may import what: the arrows of the design, held by a test."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "mrcnn": {"ray", "mlflow", "tyro", "pipelines", "jobs"},
    "pipelines": {"mlflow", "tyro", "jobs"},
    "jobs": set(),
}
TRACKING = {"tracking.py", "tracking_log.py", "tracking_system.py"}
REGISTRY = {"registry.py", "registry_log.py", "registry_store.py", "pyfunc_model.py"}
ONLY_IN = {"mlflow": TRACKING | REGISTRY, "tyro": {"cli.py"}}


def imported_packages(file: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        imports = imported_packages(file)
        assert not imports & FORBIDDEN[room], file
        for package, allowed in ONLY_IN.items():
            assert package not in imports or file.name in allowed, f"{file} imports {package}"


def test_files_beside_the_code_are_in_a_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for room in FORBIDDEN:
        found = {path for path in (ROOT / room).rglob("*") if path.is_file()}
        built = {path for path in found if path.suffix in (".py", ".pyc", ".so") or "csrc" in path.parts}
        declared = {path for pattern in settings["package-data"].get(room, ()) for path in (ROOT / room).glob(pattern)}
        assert found - built == declared, room


def test_infra_has_no_python() -> None:
    assert not list((ROOT / "infra").rglob("*.py"))


@pytest.mark.parametrize("module", ["mrcnn", "jobs.config", "jobs.cli"])
def test_help_and_settings_do_not_wait_for_pytorch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'mlflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_what_mrcnn_exports_is_there() -> None:
    import mrcnn

    assert all(getattr(mrcnn, name).__name__ == name for name in mrcnn.__all__)
    with pytest.raises(AttributeError, match="no_such"):
        _ = mrcnn.no_such  # type: ignore[attr-defined]
