"""What is loaded and from where: only what the user or root put there, without ever failing the import."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vaekernels import _build, _native, _trust, cli

REPOSITORY = Path(__file__).resolve().parents[2]
FITTING = _build.Record(
    package=_build.VERSION,
    python=_build.python_tag(),
    torch=str(torch.__version__),
    torch_cuda=torch.version.cuda,
    cpu=_build.Library("_C.so"),
    cuda=_build.Library(problem="nvcc was not found", remedy="Install it"),
)
STRANGER = 54321


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that would be loaded."""
    files: list[Path] = []
    monkeypatch.setattr(_native, "_load_module", lambda file: files.append(file) or torch)
    return files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `vaekernels build` leaves it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = _build.cache_dir(str(torch.__version__), torch.version.cuda)
    assert folder is not None
    folder.mkdir(parents=True)
    return put(folder, FITTING)


def put(folder: Path, record: _build.Record) -> Path:
    record.write(folder)
    (folder / "_C.so").write_bytes(b"not a library")
    return folder


def belongs_to_stranger(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, STRANGER, STRANGER)


def open_to_everybody(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def open_to_group(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)
    if os.geteuid() == 0:
        os.chown(path, -1, STRANGER)


def test_what_is_the_users_own_is_loaded(cache: Path, loaded: list[Path]) -> None:
    assert _native.load([cache]).folder == cache
    assert loaded == [cache / "_C.so"]


@pytest.mark.parametrize("change", [belongs_to_stranger, open_to_everybody, open_to_group])
@pytest.mark.parametrize("what", ["_C.so", _build.RECORD_NAME, ".", "..", "../.."])
def test_what_others_can_change_is_not_loaded(
    cache: Path, loaded: list[Path], change: Callable[[Path], None], what: str
) -> None:
    if change is open_to_group and os.geteuid() != 0:
        pytest.skip("only root can give a file to a group of others")
    place = (cache / what).resolve()
    change(place)
    found = _native.load([cache])
    assert found.module is None and loaded == []
    reason = str(found.reasons["cpu"])
    assert f"{place} can be changed by" in reason and "chmod go-w" in reason and "vaekernels build" in reason


def test_a_planted_library_does_not_beat_the_packages_own(
    tmp_path: Path, cache: Path, loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package").mkdir()
    package = put(tmp_path / "package", FITTING)
    os.utime(package / _build.RECORD_NAME, ns=(10**9, 10**9))
    cache.chmod(0o777)
    found = _native.load([package, cache])
    assert found.folder == package and loaded == [package / "_C.so"]
    assert f"{cache} can be changed by everybody" in found.passed_over[cache]


def test_doctor_says_what_was_not_loaded(
    cache: Path, loaded: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.chmod(0o777)
    monkeypatch.setattr(_native, "FOUND", dataclasses.replace(_native.load([cache])))
    cli.main(["doctor"])
    assert (
        f"The library in {cache} is not loaded: {cache} can be changed by everybody"
        in capsys.readouterr().out
    )
    cli.main(["doctor", "--json"])
    assert str(cache) in json.loads(capsys.readouterr().out)["not_loaded"]


def test_the_package_is_as_open_as_its_code(
    tmp_path: Path, loaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who can change the code beside a library needs no library: environments of a group, and of another
    user, are used as they are. A library that more people can change than the code is not loaded."""
    (tmp_path / "package").mkdir()
    package = put(tmp_path / "package", FITTING)
    code = package / "_native.py"
    code.touch()
    monkeypatch.setattr(_native, "PACKAGE_DIR", package)
    monkeypatch.setattr(_native, "__file__", str(code))
    open_to_everybody(package / "_C.so")
    assert _native.load([package]).folder is None
    open_to_everybody(code)
    assert _native.load([package]).folder == package
    if os.geteuid() == 0:
        for file in (package, *package.iterdir()):
            os.chown(file, STRANGER, STRANGER)
        assert _native.load([package]).folder == package
        os.chown(package / "_C.so", STRANGER + 1, STRANGER)
        assert _native.load([package]).folder is None


def test_a_sticky_folder_above_is_no_danger_but_its_owner_is(cache: Path, loaded: list[Path]) -> None:
    above = cache.parent.parent
    above.chmod(0o1777)
    assert _native.load([cache]).folder == cache
    cache.chmod(0o1777)  # here anybody may put what was not there
    assert _native.load([cache]).folder is None
    cache.chmod(0o755)
    belongs_to_stranger(above)
    assert _native.load([cache]).folder is None


def test_a_private_group_is_nobody_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    me, group = os.geteuid(), cache.stat().st_gid
    cache.chmod(0o775)
    user = pwd.struct_passwd(("ann", "x", me, group, "", "/", "/"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
    for name, members, private in (("ann", [], True), ("ann", ["bob"], False), ("lab", [], False)):
        entry = grp.struct_group((name, "x", group, members))
        monkeypatch.setattr(grp, "getgrgid", lambda gid, entry=entry: entry)
        assert (_trust.problem_of_folder(cache) is None) is private, (name, members)
    entry = grp.struct_group(("ann", "x", group, []))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: entry)
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"], raising=False)
    assert _trust.problem_of_folder(cache) is not None


@pytest.mark.parametrize("name", ["/tmp/evil.so", "../evil.so", "sub/evil.so", "..", ".", "", "a\0b"])
def test_a_record_names_files_of_its_folder_only(cache: Path, loaded: list[Path], name: str) -> None:
    (cache.parent / "evil.so").touch()
    (cache / "sub").mkdir()
    (cache / "sub" / "evil.so").touch()
    for field in ("cpu", "cuda"):
        dataclasses.replace(FITTING, **{field: _build.Library(name)}).write(cache)
        assert _native.load([cache]).module is None and loaded == []
        assert str(cache) in str(_native.load([cache]).reasons["cpu"])


def test_what_is_no_regular_file_is_not_loaded(cache: Path, loaded: list[Path]) -> None:
    library, record = cache / "_C.so", cache / _build.RECORD_NAME
    library.rename(cache / "other.so")
    library.symlink_to("other.so")
    assert "_C.so is no regular file" in str(_native.load([cache]).reasons["cpu"])
    library.unlink()
    assert "No such file" in str(_native.load([cache]).reasons["cpu"])
    record.unlink()
    os.mkfifo(record)  # would be waited for
    assert f"{record} is no regular file" in str(_native.load([cache]).reasons["cpu"])
    assert loaded == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"cpu":' * 100_000,
        json.dumps(dataclasses.asdict(FITTING)).replace("_C.so", "\\ud800"),
        json.dumps(dataclasses.asdict(FITTING)).replace("nvcc was", "\\udc00"),
        json.dumps(dataclasses.asdict(FITTING)).replace('"_C.so"', "7"),
        json.dumps(dataclasses.asdict(FITTING)).replace('"_C.so"', '["_C.so"]'),
        json.dumps({**dataclasses.asdict(FITTING), "torch": {}}),
        json.dumps({**dataclasses.asdict(FITTING), "package": None}),
        "\x00\xff",
    ],
)
def test_a_damaged_record_is_a_reason(cache: Path, loaded: list[Path], text: str) -> None:
    (cache / _build.RECORD_NAME).write_bytes(text.encode("latin-1"))
    reason = str(_native.load([cache]).reasons["cpu"])
    assert f"{cache / _build.RECORD_NAME} is not the record of a build" in reason and loaded == []
    assert "vaekernels build" in reason
    reason.encode()


def test_words_that_are_no_unicode_are_kept_as_far_as_they_are(tmp_path: Path) -> None:
    library = _build.Library(
        problem="c++ failed", remedy="Mend it", log=f"{os.fsdecode(b'lat')}\udce9 \u00e9"
    )
    dataclasses.replace(FITTING, cpu=library).write(tmp_path)
    read = _build.Record.read(tmp_path)
    assert read is not None and read.cpu.log == "lat? é"


def test_a_library_that_raises_anything_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(_native, "_load_module", fail)
    assert "failed: no such thing" in str(_native.load([cache]).reasons["cpu"])


# ---- where the cache is


def test_a_relative_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("cache", "./cache", "", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert _build.user_cache() == tmp_path / "home" / ".cache"
    monkeypatch.setenv("HOME", "home")
    assert _build.user_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert _build.user_cache() == tmp_path / "elsewhere"


WITHOUT_HOME = """
import pwd

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
import torch, vaekernels
from vaekernels import _native, cli

m = torch.zeros(2, 2)
assert float(vaekernels.gaussian_kl(m, m)) == 0
assert _native.candidates() == [_native.PACKAGE_DIR]
print(cli.main(["doctor"]), cli.main(["build"]))
"""


def test_import_without_a_home(tmp_path: Path) -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")
    }
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_HOME]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status = 0 if _native.has_kernels("cpu") and torch.version.cuda is None else None
    assert done.stdout.splitlines()[-1].endswith(" 1")
    assert status is None or done.stdout.splitlines()[-1] == "0 1"
    assert "user's build:  none: there is no folder for caches" in done.stdout
    assert (
        done.stderr.startswith("vaekernels build: there is no folder for caches")
        and "XDG_CACHE_HOME" in done.stderr
    )


# ---- sources that hide the installed package


def test_sources_that_shadow_the_installed_package_are_named(tmp_path: Path) -> None:
    clone, site = tmp_path / "clone", tmp_path / "site"
    ignored = shutil.ignore_patterns("*.so", _build.RECORD_NAME, "__pycache__")
    for folder in (clone, site):
        shutil.copytree(REPOSITORY / "vaekernels", folder / "vaekernels", ignore=ignored)
    environment = {**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = "import torch, vaekernels as v; v.gaussian_kl(torch.zeros(2, 2), torch.zeros(2, 2))"
    told = f"the sources in {clone / 'vaekernels'} shadow the installed package in {site / 'vaekernels'}"

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    warned = run(clone, "-c", code)
    assert warned.returncode == 0 and "FallbackWarning" in warned.stderr and told in warned.stderr
    assert told in run(clone, "-m", "vaekernels", "doctor").stdout
    # As the command: of the installed package, whatever the folder is.
    command = f"import sys; sys.path[0] = {str(site)!r}; from vaekernels import cli; cli.main(['doctor'])"
    shown = run(clone, "-c", command).stdout
    assert f"in {site / 'vaekernels'}\n" in shown
    assert "The sources here shadow the installed package: in this folder `python` imports" in shown
    assert str(clone / "vaekernels") in shown
    elsewhere = run(tmp_path, "-c", command).stdout
    assert f"in {site / 'vaekernels'}\n" in elsewhere and "in this folder `python` imports" not in elsewhere


# ---- builds that were killed

BUILD = """
import pathlib, sys, time
from vaekernels import _build, cli

def slow(target, scratch, say, torch):
    target.mkdir(); scratch.mkdir()
    (scratch / "object.o").touch()
    print("building", flush=True)
    time.sleep(600)

_build.build = slow
cli.main(["build"])
"""


def built(monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(target: Path, scratch: Path, say: object, torch: object) -> _build.Record:
        target.mkdir()
        return dataclasses.replace(put(target, FITTING) and FITTING)

    monkeypatch.setattr(_build, "build", quick)
    assert cli.main(["build"]) == 0


def test_killed_builds_are_cleaned_up_and_live_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache" / "vaekernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root.mkdir(parents=True)
    (root / "building-notes").mkdir()  # not ours
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    running = []
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", BUILD], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "building\n"
        running.append(process)
    try:
        for process in running[:2]:
            process.kill()
            process.wait()
        assert len(list(root.glob("building-*/objects"))) == 3
        built(monkeypatch)
        (live,) = root.glob("building-*/objects")
        assert (live / "object.o").exists() and live.parent.with_suffix(".lock").exists()
        goal = _build.cache_dir(str(torch.__version__), torch.version.cuda)
        assert goal is not None
        names = {goal.name, "building-notes", live.parent.name, f"{live.parent.name}.lock"}
        assert {entry.name for entry in root.iterdir()} == names
    finally:
        for process in running:
            process.kill()
            process.wait()
    built(monkeypatch)
    assert {entry.name for entry in root.iterdir()} == {goal.name, "building-notes"}


def test_a_build_is_open_to_nobody_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    umask = os.umask(0)
    try:
        built(monkeypatch)
    finally:
        assert os.umask(umask) == 0
    for folder, _, files in os.walk(tmp_path / "cache"):
        for name in (".", *files):
            assert stat.S_IMODE((Path(folder) / name).stat().st_mode) & 0o022 == 0


def test_nothing_is_built_where_it_would_not_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setattr(_build, "build", lambda *arguments: pytest.fail("it was built"))
    assert cli.main(["build"]) == 1
    assert f"{tmp_path / 'cache'} can be changed by everybody" in capsys.readouterr().err


def test_the_result_of_another_build_is_replaced(tmp_path: Path) -> None:
    goal, made, aside = tmp_path / "goal", tmp_path / "aside" / "made", tmp_path / "aside"
    for folder, text in ((goal, "old"), (made, "new")):
        folder.mkdir(parents=True)
        (folder / "file").write_text(text)
    rename, calls = Path.rename, []

    def meanwhile(path: Path, target: Path) -> Path:
        calls.append(path)
        if path == made and len(calls) < 3:  # another one puts its result there first
            goal.mkdir()
            (goal / "file").touch()
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", meanwhile)
        cli._into_place(made, goal, aside)
    assert (goal / "file").read_text() == "new" and len(calls) == 4
