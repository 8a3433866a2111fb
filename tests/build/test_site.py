"""The documentation site: it builds without a warning, it has everything public, and its examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vaekernels

REPOSITORY = Path(__file__).resolve().parents[2]
API = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^   (vaekernels[\w.]*)$", API, re.MULTILINE)
# Programs; the ops, documented as `vaekernels`; the trainer, by its settings; the integrations, which cannot
# be imported without their libraries, in migration.md.
INTERNAL = {
    "vaekernels.cli",
    "vaekernels.ops",
    "vaekernels.reference",
    "vaekernels.training",
    "vaekernels.integrations",
}


def modules() -> dict[str, str]:
    """The source of every module of the package, by its name."""
    found = pkgutil.walk_packages(vaekernels.__path__, "vaekernels.")
    names = ["vaekernels", *(each.name for each in found if not each.name.endswith("__main__"))]
    sources = {}
    for name in names:
        path = REPOSITORY / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file.is_file():  # not the compiled library
            sources[name] = file.read_text(encoding="utf-8")
    return sources


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Warnings are errors: a link to a missing page or heading, a reference to nothing, broken markup."""
    for needed in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(needed, reason="the site needs vaekernels[docs]")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-E"]
    command += [str(REPOSITORY / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in DOCUMENTED:
        page = (tmp_path / "site" / "api" / f"{name}.html").read_text(encoding="utf-8")
        module = importlib.import_module(name)
        public = {each for each in module.__all__ if inspect.isroutine(getattr(module, each))}
        public |= {each for each in module.__all__ if inspect.isclass(getattr(module, each))}
        assert public == {each for each in public if f'id="{name}.{each}"' in page}, "without a docstring"


def test_every_public_module_is_in_the_reference() -> None:
    top = {name for name in modules() if name.count(".") <= 1 and "._" not in name}
    assert top - INTERNAL <= set(DOCUMENTED), "add it to the list in docs/api.md"


@pytest.mark.parametrize("name", [name for name, source in modules().items() if ">>> " in source])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    found = re.findall(r"\]\(([^)#]+)", (REPOSITORY / page).read_text(encoding="utf-8"))
    assert found
    for link in found:
        assert re.match(r"https?:", link) or (REPOSITORY / link).exists(), link


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/reliability.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page: str) -> None:
    """By their path from the root, or their name where the page has said which folder it is about."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    picture = "".join(re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    named = set(re.findall(r"`([\w./]+(?:\.(?:py|h|cpp|cu|cuh|md)|/))`", text))
    named |= set(re.findall(r"[\w/]+(?:\.(?:py|h|cpp|cu)\b|/(?=[ ,\n]))", picture))
    about = ("vaekernels", "vaekernels/training", "csrc", "tests/ops", "tests/build", "tests/training")
    folders = [REPOSITORY, *(REPOSITORY / each for each in about)]
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    assert len(named) > 3 and missing == set()


def test_every_convention_of_the_table_has_its_section_and_its_code() -> None:
    page = (REPOSITORY / "docs" / "free-bits.md").read_text(encoding="utf-8")
    linked = re.findall(r"^\| `.*?\]\(#([\w-]+)\)", page, re.MULTILINE)
    sections = re.split(r"^#{2,3} ", page, flags=re.MULTILINE)[1:]
    coded = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-"): body.count("same(")
        for title, _, body in (section.partition("\n") for section in sections)
        if "```python" in body
    }
    assert set(linked) == set(coded) and len(linked) == 14
    assert all(coded.values())
    for section in sections:
        for code in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            ast.parse(code)
