"""Who can change a file. A library is code that runs when it is loaded, so what somebody besides the user and
root could have put there is not loaded.

Once no folder on the way to a file can be changed by others, neither can what it names: there is no moment
between the check and the loading in which they could exchange it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

KNOWN = os.name == "posix"
"""Whether this system tells who owns a file in the way that is understood here."""


def problem_of_folder(folder: Path) -> str | None:
    """Why others can change what lies in `folder`: it or a folder above it is theirs or open to them. None
    where they cannot. `folder` must be absolute and free of symbolic links."""
    for place in (folder, *folder.parents):
        status = os.stat(place)
        others = writers(place, status)
        # In a sticky folder, such as /tmp, nobody can exchange what is another's.
        if place != folder and status.st_mode & stat.S_ISVTX:
            others = {who for who in others if who == owner(status)}
        if others:
            return told(place, others)
    return None


def problem_of_file(file: Path, allowed: frozenset[str] = frozenset()) -> str | None:
    """Why others than `allowed` can change this file, or why it is none; not whether they can replace it."""
    status = os.lstat(file)
    if not stat.S_ISREG(status.st_mode):
        return f"{file} is no regular file"
    others = writers(file, status) - allowed
    return told(file, others) if others else None


def writers(path: Path, status: os.stat_result) -> set[str]:
    """Those besides the user and root who may write what lies at `path` and has this status."""
    found = set() if status.st_uid in (0, os.geteuid()) else {owner(status)}
    if status.st_mode & stat.S_IWOTH:
        found.add("everybody")
    elif status.st_mode & stat.S_IWGRP and not _private(path, status):
        found.add(f"the group {_group(status.st_gid)}")
    return found


def owner(status: os.stat_result) -> str:
    return f"the user {_user(status.st_uid)}"


def told(path: Path, others: set[str]) -> str:
    return f"{path} can be changed by {' and '.join(sorted(others))}"


def _private(path: Path, status: os.stat_result) -> bool:
    """Whether what the group may write, its owner alone may: the group has their name, is their first and has
    no members. Where people have such groups, new files are open to them (umask 002)."""
    import grp
    import pwd

    try:
        # With an access control list the bits of the group stand for everybody on it.
        if "system.posix_acl_access" in getattr(os, "listxattr", lambda path: ())(path):
            return False
    except OSError:  # a file system without such lists
        pass
    try:
        user, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    same = group.gr_name == user.pw_name and group.gr_gid == user.pw_gid
    return same and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
