"""What a run writes down while it trains: ``log.jsonl`` and, for TensorBoard, event files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaekernels._files import lines_of, open_regular
from vaekernels.training.checkpoint import write_text
from vaekernels.training.errors import CheckpointError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

__all__ = ["Log", "read"]


_OF_AN_EPOCH = {  # numbers that are read again, as `_numbers` names them
    "/weight",
    "/train/rate",
    "/train/nll",
    "/heldout/rate",
    "/heldout/nll",
    "/heldout/active_units",
    "/heldout/mi_lower/value",
}


class Log:
    """Lines of JSON, ``kind`` "step" (the training batch of every so many steps) or "epoch" (means over the
    epoch, and the evaluation on held-out data), and their numbers in TensorBoard. Only the first process
    writes."""

    def __init__(self, path: Path, fabric: Fabric, *, tensorboard: bool) -> None:
        self._path = path
        self._fabric = fabric
        self._tensorboard: TensorBoardLogger | None = None
        self._wanted = tensorboard

    def start(self) -> None:
        """Begin an empty log."""
        self._begin([], purge_step=None)

    def resume(self, step: int, epochs: int) -> None:
        """Go on after a checkpoint of ``step``, when ``epochs`` epochs were over. What a run that was killed
        later than that had written since is dropped: lines of later steps, and that of the epoch that ended
        with ``step``, where the checkpoint is from before its evaluation."""
        kept = [
            line
            for line in read(self._path)
            if line["step"] <= step and (line["kind"] != "epoch" or line["epoch"] <= epochs)
        ]
        # TensorBoard drops whole steps: what is kept of this one is written again.
        self._begin(kept, purge_step=step)
        for line in kept:
            if line["step"] == step:
                values = {key: value for key, value in line.items() if key not in ("kind", "step")}
                self._show(line["kind"], step, values)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if not self._fabric.is_global_zero:
            return
        line = {"kind": kind, "step": step, **values}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {_reason(error)}") from error
        self._show(kind, step, values)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.finalize("")

    def _show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.log_metrics(dict(_numbers(kind, values)), step)
        except (OSError, ValueError) as error:  # Fabric's logger turns an OSError into a ValueError
            folder = self._tensorboard.log_dir
            raise CheckpointError(f"cannot write into {folder}: {_reason(error)}") from error

    def _begin(self, lines: list[dict[str, Any]], purge_step: int | None) -> None:
        if not self._fabric.is_global_zero:
            return
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        if self._wanted:
            from lightning_fabric.loggers.tensorboard import TensorBoardLogger

            self._tensorboard = TensorBoardLogger(
                self._path.parent, name="", version="tensorboard", purge_step=purge_step
            )


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. What is damaged is left out: a last line that was not written to its end, by a run
    that was killed, without a word, other lines with a warning. CheckpointError if it cannot be read."""
    try:
        if not path.exists():
            return []
        with open_regular(path) as file:
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    parsed = [_parsed(line) for line in lines_of(text)]
    damaged = [number for number, line in enumerate(parsed, 1) if line is None]
    if damaged and damaged != [len(parsed)]:
        warnings.warn(
            f"{path}: damaged lines left out: {len(damaged)}, the first of them line {damaged[0]}",
            stacklevel=2,
        )
    return [line for line in parsed if line is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    """None if it is not what `Log.write` writes."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict) or any(type(parsed.get(key)) is not int for key in ("step", "epoch")):
        return None
    numbers = dict(_numbers("", parsed))
    if parsed.get("kind") == "epoch":
        return parsed if numbers.keys() >= _OF_AN_EPOCH else None
    return parsed if parsed.get("kind") == "step" else None


def _numbers(prefix: str, values: dict[str, Any]) -> list[tuple[str, float]]:
    """The single numbers in nested tables: ``epoch/heldout/rate``."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found.extend(_numbers(f"{prefix}/{name}", value))
        elif isinstance(value, int | float):
            found.append((f"{prefix}/{name}", float(value)))
    return found


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
