"""Files that are written whole, and what killed processes leave of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vaekernels import _leftovers
from vaekernels._files import write_atomically
from vaekernels._leftovers import claim, remove_dead

KILLED = """
import os, pathlib, signal, sys
from vaekernels import _files

def die(*arguments):
    print("writing", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()

_files.os.fsync = die
_files.write_atomically(pathlib.Path(sys.argv[1]), "half")
"""


def writer(path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(path), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_writer_left_goes_with_the_next_and_a_live_ones_stays(tmp_path: Path) -> None:
    mine = tmp_path / ".report.json.original.tmp"
    mine.touch()
    for name in ("report.json", "config.toml"):
        writer(tmp_path / name, "die").wait()
        assert len(list(tmp_path.iterdir())) == 2  # with that of the last one
    live = writer(tmp_path / "report.json", "wait")
    assert len(list(tmp_path.iterdir())) == 2
    write_atomically(tmp_path / "report.json", "whole")
    assert (tmp_path / "report.json").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 3 and mine.exists()
    live.communicate("")
    assert live.returncode == 0 and (tmp_path / "report.json").read_text() == "half"
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, "report.json"]


def test_a_claimed_file_is_left_until_it_is_closed(tmp_path: Path) -> None:
    removed: list[Path] = []

    def cleaner(file: Path) -> None:
        removed.append(file)

    made, file = claim(tmp_path, "a-", ".lock")
    remove_dead(tmp_path, "a-", ".lock", cleaner)
    assert removed == [] and file.exists()
    os.close(made)
    remove_dead(tmp_path, "a-", ".lock", cleaner)
    assert removed == [file] and not file.exists()


def test_a_file_that_was_removed_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = _leftovers._lock, []

    def late(descriptor: int) -> bool | None:
        calls.append(descriptor)
        if len(calls) == 1:
            for file in tmp_path.iterdir():
                file.unlink()
        return lock(descriptor)

    monkeypatch.setattr(_leftovers, "_lock", late)
    descriptor, file = claim(tmp_path, "a-", ".lock")
    assert len(calls) == 2 and file.exists()
    os.close(descriptor)


def test_links_and_files_of_others_are_left(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.touch()
    (tmp_path / "a-12345678.lock").symlink_to(target)
    os.mkfifo(tmp_path / "a-abcdefgh.lock")
    (tmp_path / "a-1234567.lock").touch()
    remove_dead(tmp_path, "a-", ".lock", lambda file: None)
    assert len(list(tmp_path.iterdir())) == 4
