"""Which room may import what: the arrows of the design, held by a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "mrcnn": {"ray", "mlflow", "tyro", "pipelines", "jobs"},
    "pipelines": {"mlflow", "tyro", "jobs"},
    "jobs": set(),
}
TRACKING = {"tracking.py", "tracking_log.py", "tracking_system.py"}
ONLY_IN = {"mlflow": {*TRACKING, "registry.py", "pyfunc_model.py"}, "tyro": {"cli.py"}}


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


def test_infra_has_no_python() -> None:
    assert not list((ROOT / "infra").rglob("*.py"))
