"""The command `vaekernels`, for where torch cannot be imported.

Nor can the package then, in which this would otherwise be, and the user would see a traceback in place of
what to do.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Runs the command and returns its exit status."""
    # Importing torch takes seconds, and would take KeyboardInterrupt for a library that is missing.
    stoppable = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if stoppable:
        signal.signal(signal.SIGINT, _stop)
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        how = "pip install torch" if absent else "pip install --force-reinstall torch"
        print(
            f"vaekernels: {sys.executable} cannot import torch: {error}\n"
            f"Run `{how}`, then `vaekernels doctor`: it says whether the kernels fit that torch.",
            file=sys.stderr,
        )
        return 1
    from vaekernels.cli import main as run

    if stoppable:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _stop(signum: int, frame: object) -> None:
    """What Ctrl-C does before there is anything to save."""
    os.write(2, b"stopped\n")
    os._exit(130)
