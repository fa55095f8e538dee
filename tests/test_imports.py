"""Imports of the prediction library run downwards: its core knows no promises, and no module imports itself in a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "adaptive_inference"
MODULES = {path.relative_to(PACKAGE.parent).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
NAMES = {".".join(name.parts).removesuffix(".__init__"): path for name, path in MODULES.items()}


def imports_of(name):
    """Return the absolute names that a module imports, at its top or inside functions."""
    found = []
    package = name if NAMES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(NAMES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return set(found)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_library_imports_only_what_is_below_it(name):
    above = {"engine", "experiments", "benchmarks", "examples", "args", "predict", "dataloader"}
    for imported in imports_of(name):
        assert imported.split(".")[0] not in above
        if ".promises" not in name:
            assert not imported.startswith("adaptive_inference.promises"), imported


def test_there_are_no_circles():
    arrows = {name: {other for other in imports_of(name) if other in NAMES} - {name} for name in NAMES}
    # The package's own file names what users import, and is below nothing.
    arrows.pop("adaptive_inference")
    remaining = {name: others - {"adaptive_inference"} for name, others in arrows.items()}
    while remaining:
        free = {name for name, others in remaining.items() if not others & remaining.keys()}
        assert free, f"in a circle: {sorted(remaining)}"
        remaining = {name: others for name, others in remaining.items() if name not in free}
