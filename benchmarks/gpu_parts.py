"""Runs the parts of a check, each in a process of its own, and says what came of them.

A part passes, fails, or is not possible here, with the reason. Parts of one lane run one after the other,
lanes side by side. Nothing here knows torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["FAIL", "NOT_POSSIBLE", "PASS", "Outcome", "Part", "judge_exit", "judge_tests", "run", "table"]

PASS, FAIL, NOT_POSSIBLE = "pass", "fail", "not possible here"
STATUS_NOT_POSSIBLE = 77
LAST_LINES = 40  # of a failed part's log, to show


@dataclass(frozen=True)
class Outcome:
    """What came of a part."""

    part: str
    status: str
    detail: str
    seconds: float = 0.0
    log: str = ""  # its end, where the part failed


Judge = Callable[[int, str], tuple[str, str]]
"""From the exit status and the output to the status and one line of detail."""


def judge_exit(returncode: int, output: str) -> tuple[str, str]:
    """By the exit status alone; the last line of the output is the detail."""
    lines = output.strip().splitlines()
    last = lines[-1].strip() if lines else ""
    status = {0: PASS, STATUS_NOT_POSSIBLE: NOT_POSSIBLE}.get(returncode, FAIL)
    return status, last if status != FAIL else f"{ended(returncode)}: {last}"


def ended(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def judge_tests(report: Path) -> Judge:
    """By the JUnit file that pytest wrote. Not possible where every test was skipped."""

    def judge(returncode: int, output: str) -> tuple[str, str]:
        try:
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        except (OSError, ElementTree.ParseError):
            return judge_exit(returncode or 1, output)
        failed = [_name(c) for c in cases if c.find("failure") is not None or c.find("error") is not None]
        reasons = [s.get("message", "") for c in cases if (s := c.find("skipped")) is not None]
        passed = len(cases) - len(failed) - len(reasons)
        why = "; ".join(dict.fromkeys(map(_reason, reasons)))
        if failed:
            more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
            return FAIL, f"{len(failed)} of {len(cases)} failed: {', '.join(failed[:3])}{more}"
        if reasons and not passed:
            return NOT_POSSIBLE, why
        if returncode != 0 or not cases:
            # Also pytest's own errors, such as none collected, and a crash after the last test.
            return judge_exit(returncode or 1, output)
        return PASS, f"{passed} passed" + (f", {len(reasons)} skipped: {why}" if reasons else "")

    return judge


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"


def _reason(message: str) -> str:
    return message.removeprefix("Skipped: ").strip() or "no reason given"


@dataclass(frozen=True)
class Part:
    """A command, how long it may take, and how it is judged."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    judge: Judge = judge_exit
    lane: str = "main"
    environment: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""  # why it is not even tried


@dataclass
class Clock:
    """The seconds that all parts have together."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)


def run(parts: Iterable[Part], folder: Path, clock: Clock, say: Callable[[str], None]) -> list[Outcome]:
    """Runs the parts and returns their outcomes in the order of the parts. Logs go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    every = list(parts)
    lanes: dict[str, list[Part]] = {}
    for part in every:
        lanes.setdefault(part.lane, []).append(part)

    def one_lane(lane: list[Part]) -> list[Outcome]:
        outcomes = []
        for part in lane:
            outcome = run_part(part, folder, clock)
            outcomes.append(outcome)
            say(f"{outcome.part}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.detail}")
        return outcomes

    with ThreadPoolExecutor(max(1, len(lanes))) as pool:
        done = [outcome for outcomes in pool.map(one_lane, lanes.values()) for outcome in outcomes]
    order = {part.name: i for i, part in enumerate(every)}
    return sorted(done, key=lambda outcome: order[outcome.part])


def run_part(part: Part, folder: Path, clock: Clock) -> Outcome:
    if part.refused:
        return Outcome(part.name, NOT_POSSIBLE, part.refused)
    limit = min(part.limit, clock.left())
    if limit <= 0:
        return Outcome(part.name, FAIL, "not run: the time for all parts was over")
    start = time.monotonic()
    log = folder / f"{part.name.replace(' ', '-')}.log"
    with log.open("wb") as file:
        # A session of its own: what runs past its limit is ended with all that it started.
        process = subprocess.Popen(
            list(part.command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **part.environment},
            start_new_session=True,
        )
        timed_out = False
        try:
            returncode = process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            returncode = -signal.SIGKILL
        finally:
            _end(process)
    seconds = time.monotonic() - start
    output = log.read_text(encoding="utf-8", errors="replace")
    if timed_out:
        status, detail = FAIL, f"ended after its limit of {limit:.0f} s"
    else:
        status, detail = part.judge(returncode, output)
    shown = "\n".join(output.rstrip().splitlines()[-LAST_LINES:]) if status == FAIL else ""
    return Outcome(part.name, status, detail, seconds, shown)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a line for each part."""
    lines = ["| part | result | s | |", "| --- | --- | ---: | --- |"]
    for o in outcomes:
        detail = o.detail.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {o.part} | {o.status} | {o.seconds:.0f} | {detail} |")
    return "\n".join(lines)
