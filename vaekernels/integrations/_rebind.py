"""Puts one class or module in another's place in all modules of a library."""

from __future__ import annotations

import sys

__all__ = ["rebind"]


def rebind(library: str, old: object, new: object) -> None:
    """Every name that means `old` in a module of the library that is imported already means `new`."""
    for name, module in list(sys.modules.items()):
        if name == library or name.startswith(library + "."):
            # vars, not getattr: packages that import lazily import what they are asked for.
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
