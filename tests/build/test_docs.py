"""The tutorials: every block of code in docs/ runs as it stands there.

Data sets by name are a hundredth of their size, so that a training takes a second; the user's own are real.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="the trainer needs vaekernels[train]")
pytest.importorskip("typer", reason="the trainer needs vaekernels[train]")
pytest.importorskip("jinja2", reason="the pages need vaekernels[train]")

import torch
import torch.distributed as dist
from libraries import need
from tiny_runs import tiny_data  # noqa: F401 (the fixture)
from typer.testing import CliRunner

from vaekernels.training.cli import app

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore::vaekernels.FallbackWarning"),
    pytest.mark.usefixtures("tiny_data"),
]


def blocks(name: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name",
    [
        "index.md",
        "use-the-ops.md",
        "export.md",
        "choose-free-bits.md",
        "free-bits.md",
        "is-my-vae-collapsed.md",
        "aggregate-posterior.md",
        "train.md",
        "use-a-model.md",
        "collapse-in-your-text.md",
    ],
)
def test_a_tutorial_runs_from_its_first_line_to_its_last(name: str) -> None:
    found = blocks(name)
    assert found
    space: dict[str, object] = {}
    for language, code in found:
        if language == "python":
            exec(compile(code, name, "exec"), space)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "vaekernels"
            if arguments[0] == "train":
                arguments += ["--set", "engine.tensorboard=false", "--device", "cpu"]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"


# The library that a section of migration.md is about, and what it imports as.
SECTIONS = {
    "Eager PyTorch": None,
    "diffusers": "diffusers",
    "pythae": "pythae",
    "scvi-tools": "scvi",
    "torch.distributions": None,
    "Pyro": "pyro",
    "Dreamer": None,
    "A collapse, found while training": None,
    "Exported programs": None,
}


def sections(name: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", (DOCS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("title", SECTIONS)
def test_before_and_after(title: str) -> None:
    """Each section of migration.md from its first line to its last, where its library is installed."""
    if (library := SECTIONS[title]) is not None:
        need(library)
    found = BLOCK.findall(sections("migration.md")[title])
    assert found and {language for language, _ in found} == {"python"}
    space: dict[str, object] = {}
    for _, code in found:
        exec(compile(code, f"migration.md, {title}", "exec"), space)


def test_every_section_of_the_migrations_is_run() -> None:
    assert set(sections("migration.md")) == set(SECTIONS)


def test_several_processes(tmp_path: Path) -> None:
    """The script under two processes. Its commands, for four GPUs, are tried with two processes in
    test_training_ddp."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    (commands,), (script,) = (
        [code for language, code in blocks("multi-gpu.md") if language == kind] for kind in ("sh", "python")
    )
    assert [line.split()[0] for line in commands.splitlines()] == ["torchrun", "vaekernels"]
    (tmp_path / "ddp.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp.py"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_page_is_known_here_and_links_lead_somewhere() -> None:
    pages = {path.name for path in DOCS.glob("*.md")}
    assert pages == {
        "index.md", "export.md", "integrations.md", "use-the-ops.md",
        "aggregate-posterior.md", "choose-free-bits.md", "free-bits.md",
        "is-my-vae-collapsed.md", "use-a-model.md", "collapse-in-your-text.md",
        "train.md", "multi-gpu.md", "api.md", "install.md", "install-matrix.md", "migration.md",
        "performance.md", "architecture.md", "reliability.md",
    }  # fmt: skip
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text(encoding="utf-8")):
            assert (DOCS / link).is_file(), f"{page}: {link}"


def test_the_settings_named_in_the_tutorials_exist() -> None:
    from vaekernels.training.config import presets, settings

    text = (DOCS / "train.md").read_text(encoding="utf-8")
    for setting in re.findall(r"`((?:objective|model|strategy|data)\.\w+=[\w.]+)`", text):
        settings.changed(presets.PRESETS["digits"], settings.parse_set([setting]))
    listed = re.search(r"^Presets: (.*?)\.$", text, re.MULTILINE)
    assert listed and set(re.findall(r"`([\w-]+)`", listed.group(1))) == set(presets.PRESETS)


class _Model(torch.nn.Module):
    """What the README takes for granted: any model."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.8 * x[:, :2], torch.full_like(x[:, :2], -1.0)

    def log_likelihood(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return -0.5 * (x[:, :2] - z).square().sum(1)


def test_the_readme_runs() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = torch.randn(4, 4, 6, 5, 5, generator=draw).unbind()
    given: dict[str, object] = dict(zip(("mu", "logvar", "prior_mu", "prior_logvar"), tensors, strict=True))
    given |= {"moments": torch.cat(tensors[:2], 1), "model": _Model()}
    given |= {"heldout": torch.randn(60, 3, generator=draw)}
    readme = README.read_text(encoding="utf-8")
    found = [code for language, code in BLOCK.findall(readme) if language == "python"]
    assert len(found) >= 4
    space: dict[str, object] = {}
    for code in found:
        space |= given  # the first block makes a mu of its own
        exec(compile(code, "README.md", "exec"), space)
