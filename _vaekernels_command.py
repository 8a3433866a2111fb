"""The command `vaekernels` as far as it needs nothing but Python: help, the version, a misspelt command, and
what to do where torch cannot be imported.

Importing torch takes seconds, and the package, in which this would otherwise be, cannot be imported without
it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec

__all__ = ["COMMANDS", "TRAIN_COMMANDS", "answered", "main"]

TRAIN_COMMANDS = {
    "train": "train a VAE on a data set every machine has, or on your own",
    "diagnose": "is the latent of a trained run used, and if not, why",
    "sample": "sentences or images that a run makes up",
    "encode": "the codes of examples: mu, logvar and rate",
    "decode": "what the decoder makes of codes",
    "interpolate": "what lies between two examples",
    "traverse": "what each dimension of z changes",
    "compare": "runs side by side: is z used, and at what price",
    "export": "encoder and decoder for torch.export",
    "settings": "every setting of train, its default and meaning",
    "demo": "VAEs that collapse, and the same ones cured, side by side",
}
COMMANDS = {
    "doctor": "say which kernels run here, and how to get those that do not",
    "build": "compile the kernels against the torch in use",
    "bench": "time the latent layer on this machine",
    **{name: f"{meaning} (needs vaekernels[train])" for name, meaning in TRAIN_COMMANDS.items()},
}


def main() -> int:
    """Runs the command and returns its exit status."""
    if (status := answered(sys.argv[1:])) is not None:
        return status
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


def answered(arguments: Sequence[str]) -> int | None:
    """The exit status of what is answered here; None if a command has to be run. SystemExit, as argparse has
    it, after the help, the version and wrong options."""
    if arguments and not arguments[0].startswith("-"):
        if arguments[0] not in COMMANDS:
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
            print(f"vaekernels: there is no command {arguments[0]!r}; {hint}", file=sys.stderr)
            return 2
        if arguments[0] not in ("doctor", "build"):  # the others read their arguments themselves
            return None
    parser = _parser()
    if parser.parse_args(arguments).command is None:
        parser.print_help()
        return 2
    return None


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        package = find_spec("vaekernels")
        assert package is not None and package.submodule_search_locations
        # From its file: the package imports torch.
        build = runpy.run_path(os.path.join(package.submodule_search_locations[0], "_build.py"))
        print(f"vaekernels {build['VERSION']}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vaekernels", description="The latent layer of a VAE as one operation, for PyTorch."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    described = {
        "doctor": "Says which kernels run here, and how to get those that do not. Exit status: 0 if all "
        "kernels for this torch are there, 1 if some are missing.",
        "build": "Compiles the kernels against the torch in use, into the user's cache "
        "(XDG_CACHE_HOME, else ~/.cache). Uses CXX, CXXFLAGS, LDFLAGS, MAX_JOBS, CUDA_HOME, "
        "TORCH_CUDA_ARCH_LIST and VAEKERNELS_CUDA=0.",
    }
    made = {
        name: commands.add_parser(
            name, help=meaning, description=described.get(name), add_help=name in described
        )
        for name, meaning in COMMANDS.items()
    }
    made["doctor"].add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser


def _stop(signum: int, frame: object) -> None:
    """What Ctrl-C does before there is anything to save."""
    os.write(2, b"stopped\n")
    os._exit(130)
