"""What every command of the package does at its edges: standard output, and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["STOPPED", "importing", "run"]

STOPPED = 130  # the exit status of what Ctrl-C ends, as shells have it


def run(command: Callable[[], int]) -> int:
    """Runs ``command`` and returns its exit status. A terminal or pipe that is not UTF-8 gets the characters
    that it has, and the others as ``\\u0394``; Ctrl-C is one word and status 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED


@contextmanager
def importing() -> Iterator[None]:
    """For imports that take seconds: Ctrl-C ends the process at once. As an exception it would be lost, for
    libraries take every exception from what they import as its absence. `_vaekernels_command` has the same,
    for where this package cannot be imported."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # another's, or not to be stopped
        yield
        return

    def stop(signum: int, frame: object) -> None:
        os.write(2, b"stopped\n")
        os._exit(STOPPED)

    try:
        signal.signal(signal.SIGINT, stop)
    except ValueError:  # outside the main thread, which gets no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
