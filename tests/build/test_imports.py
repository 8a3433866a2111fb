"""The package's modules import one another without a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import vaekernels

PACKAGE = Path(vaekernels.__file__).parent


def module_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports: at the top, in functions, and under TYPE_CHECKING.

    Importing a.b.c also runs a/__init__.py and a/b/__init__.py, which is left out: every module of a package
    depends on its __init__ in that way.
    """
    sources = {module_of(path, package): path for path in sorted(package.rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for name, path in sources.items():
        home = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                # `from package import name`: the module package.name where there is one, else the package.
                targets |= {
                    f"{base}.{alias.name}" if f"{base}.{alias.name}" in sources else base
                    for alias in node.names
                }
        found[name] = (targets & sources.keys()) - {name}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def test_no_module_imports_itself_through_others() -> None:
    graph = imports(PACKAGE)
    assert "vaekernels.ops" in graph["vaekernels.collapse.measurements"]  # from vaekernels import ops
    assert [sorted(circle) for circle in circles(graph)] == []


def test_circles_are_found_whatever_the_import_looks_like(tmp_path: Path) -> None:
    package = tmp_path / "p"
    (package / "sub").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "a.py": "def f():\n    from p import b\n",
        "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.sub.c import thing\n",
        "sub/__init__.py": "from . import c\n",
        "sub/c.py": "import os\nfrom .. import a\n",
        "sub/d.py": "from . import c\nimport p.a\n",
    }.items():
        (package / name).write_text(text)
    assert circles(imports(package)) == [{"p.a", "p.b", "p.sub.c"}]
