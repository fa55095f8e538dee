"""The graph of imports between modules, read from the source; ``python -m tests.imports`` prints a summary.

A name that a package re-exports counts as imported from the module that defines it: ``from models import
IMTA`` is an import of ``models.imta``. The tests themselves are left out.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("tests", "save", "data", "docs", "results", "weights", "node_modules")


class ImportGraph:
    """The modules of a project and what they import.

    Args:
        root: The folder whose Python files are read; hidden folders and ``LEFT_OUT`` are skipped.
    """

    def __init__(self, root: Path = ROOT):
        self.files = {_module_name(path.relative_to(root)): path for path in _source_files(root)}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.files.items()}
        self.imports = {name: set(self._imports_of(name)) - {name} for name in self.files}

    def is_package(self, name: str) -> bool:
        """Return True if ``name`` is the ``__init__.py`` of a folder."""
        return self.files[name].name == "__init__.py"

    def cycles(self) -> list[list[str]]:
        """Return the groups of modules that import each other, directly or through others."""
        reached = {name: self.reachable(name) for name in self.files}
        groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in self.files}
        return sorted(sorted(group) for group in groups if group)

    def longest_chain(self) -> list[str]:
        """Return the longest chain of imports as a list of modules; the graph must have no cycles."""

        @cache
        def chain(name: str) -> tuple[str, ...]:
            return (name, *max(map(chain, sorted(self.imports[name])), key=len, default=()))

        return list(max(map(chain, sorted(self.files)), key=len))

    def reachable(self, name: str) -> set[str]:
        """Return the modules that ``name`` imports, directly or through others."""
        reached: set[str] = set()
        waiting = list(self.imports[name])
        while waiting:
            module = waiting.pop()
            if module not in reached:
                reached.add(module)
                waiting += self.imports[module]
        return reached

    def _imports_of(self, name: str) -> Iterator[str]:
        for node in _executed_nodes(self.trees[name]):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.files)
            elif isinstance(node, ast.ImportFrom):
                source = self._absolute(name, node)
                for alias in node.names:
                    yield from self._defining_module(source, alias.name)

    def _absolute(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = name.split(".") if self.is_package(name) else name.split(".")[:-1]
        base = package[: len(package) - node.level + 1]
        return ".".join([*base, node.module] if node.module else base)

    def _defining_module(self, source: str, attribute: str) -> Iterator[str]:
        """Yield the module of the project that ``from source import attribute`` reads, if it is one."""
        if f"{source}.{attribute}" in self.files:
            yield f"{source}.{attribute}"
        elif source in self.files:
            if self.is_package(source):
                for node in self.trees[source].body:
                    if isinstance(node, ast.ImportFrom) and attribute in {
                        a.asname or a.name for a in node.names
                    }:
                        yield from self._defining_module(self._absolute(source, node), attribute)
                        return
            yield source


def _executed_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but those below ``if TYPE_CHECKING``, which never run."""
    yield node
    if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from _executed_nodes(child)


def _source_files(root: Path) -> Iterator[Path]:
    for path in _tracked_files(root) or sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not any(folder in LEFT_OUT or folder.startswith(".") for folder in folders):
            yield path


def _tracked_files(root: Path) -> list[Path]:
    """Return the Python files of a git clone: programs that its user keeps there are no part of it."""
    if not (root / ".git").exists():
        return []
    command = ["git", "ls-files", "-z", "*.py"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a clone on a machine without git
        return []
    return [path for name in listed.stdout.split("\0") if name and (path := root / name).exists()]


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main(root: Path = ROOT) -> None:
    """Print the number of modules, the cycles and the longest chain of the project in ``root``."""
    graph = ImportGraph(root)
    sys.stdout.write(f"{len(graph.files)} modules\ncycles: {graph.cycles() or 'none'}\n")
    if not graph.cycles():
        chain = graph.longest_chain()
        sys.stdout.write(f"longest chain, {len(chain)} modules: {' -> '.join(chain)}\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
