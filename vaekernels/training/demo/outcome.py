"""One model of a demo: how it is trained, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from vaekernels.collapse import Curve, Report
from vaekernels.collapse.report import PAGE
from vaekernels.training import data as datasets
from vaekernels.training import diagnosis, gallery
from vaekernels.training.config import Config, presets, settings
from vaekernels.training.run import open_run
from vaekernels.training.trainer import Trainer

__all__ = ["Outcome", "Variant", "run"]


@dataclass(frozen=True)
class Variant:
    """``given``: settings over those of ``preset``, as on the command line."""

    title: str
    preset: str
    given: str = ""

    def config(self, over: Mapping[str, object]) -> Config:
        """``over``: settings over all others."""
        config = settings.changed(presets.PRESETS[self.preset], settings.parse_set(self.given.split()))
        return settings.changed(config, over)

    @property
    def folder(self) -> str:
        kept = "".join(c if c.isalnum() or c == "." else "-" for c in self.title)
        return "-".join(part for part in kept.split("-") if part)


@dataclass(frozen=True)
class Outcome:
    """``page``: where its report is, as a link; ``seen``: None for vectors; ``curves``: of the training, by
    panel and line."""

    title: str
    page: str
    report: Report
    seen: gallery.Sentences | gallery.Images | None
    curves: dict[str, dict[str, Curve]]

    def linked(self, page: str) -> Outcome:
        return replace(self, page=page)

    @property
    def verdict(self) -> str:
        subtype = self.report.subtype
        return self.report.verdict + (f" ({subtype})" if subtype else "")

    @property
    def alive(self) -> bool:
        """Whether the decoder was found to use what the encoder sends."""
        return self.report.verdict in ("informative", "partial")


def run(variant: Variant, over: Mapping[str, object], folder: Path, console: Console) -> Outcome:
    """Train, diagnose, and keep run and report in ``folder``."""
    config = variant.config(over)
    data = datasets.load(config.data, console.print)
    trainer = Trainer(config, data, folder, console)
    trainer.fit()
    opened = open_run(folder, console.print)
    console.print("diagnosing ...", highlight=False)
    report = diagnosis.diagnose(opened, train=False, progress=console.is_terminal)
    more = diagnosis.extras(opened)
    diagnosis.save(report, folder, more)
    console.print(f"  {report.headline}", highlight=False)
    seen = gallery.look(opened.model, data, opened.device)
    return Outcome(variant.title, f"{variant.folder}/{PAGE}", report, seen, diagnosis.curves(opened))
