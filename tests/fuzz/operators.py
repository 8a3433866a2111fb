"""Calls of the operators, `torch.ops.vaekernels`, with arguments that may be anything of their type.

The arguments are made from the operators' schemas, so that they fit each other, and then one or a few are
replaced by something else. An operator may refuse what it is given; it must not crash, return memory that
nobody wrote, or change what it was given.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import torch
from fuzz.judge import Finding, same_bits
from fuzz.problem import SPECIAL, WORDS, Source, compute_dtype, storage_of, tensor
from torch import Tensor

# What torch.ops raises: TORCH_CHECK_TYPE, _VALUE, plain TORCH_CHECK, and _NOT_IMPLEMENTED (a RuntimeError).
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError)
STRINGS = {
    "clamp": ("batch", "sample"),
    "penalty": ("floor", "hinge", "mask"),
    "reduction": ("batchmean", "sum", "mean", "none", "elementwise"),
    "parameterization": ("logvar", "log_std", "std", "softplus"),
}
NUMBERS = (0, 1, -1, 2, 3, -2, 5, -(2**31), 2**45, 2**62, -(2**63), 2**63 - 1)
ODD_DTYPES = (
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
    torch.float8_e5m2,
    torch.float32,
    torch.float16,
)
# How ASan's allocator fills what nobody wrote yet; see __main__.py.
UNWRITTEN = {8: -4702111234474983746, 4: -1094795586, 2: -16706}


@functools.cache
def schemas() -> list[torch.FunctionSchema]:
    """Of every operator of the package, in the order of their names."""
    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("vaekernels::")]
    return sorted(found, key=lambda s: (s.name, s.overload_name))


class Call:
    """One call: its operator and arguments."""

    def __init__(self, data: bytes) -> None:
        self.source = source = Source(data)
        every = schemas()
        self.schema = every[source.below(len(every))]
        self.dtype = source.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
        ndim = source.choice((2, 3, 1, 4, 0, 5))
        self.shape = [source.choice((2, 3, 1, 4, 8, 0, 17)) for _ in range(ndim)]
        for d in range(ndim):
            if math.prod(self.shape) > 600:
                self.shape[d] = min(self.shape[d], 2)
        self.dim = source.below(ndim) if ndim else 0
        self.packed = ndim > 0 and source.below(3) == 2
        self.prior = source.below(3) == 2
        self.batch_dims = min(source.below(3), ndim)
        self.reduction = source.choice(STRINGS["reduction"])
        self.threshold = source.choice((None, "free_bits", "free_bits_per_group"))
        if self.reduction == "elementwise":
            self.threshold = None
        self.samples = source.choice((None, 1, 3, 0))
        axes = list(range(self.batch_dims, ndim))
        self.groups = None if source.below(2) else axes[: source.below(len(axes) + 1)]
        self.arguments = {a.name: self.fitting(a) for a in self.schema.arguments}
        names = list(self.arguments)
        for _ in range(source.choice((1, 1, 0, 2, 3, 5))):
            name = source.choice(names)
            self.arguments[name] = self.odd(name, self.arguments[name])

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            return f"<{value.dtype} {list(value.shape)} strides {value.stride()} on {value.device}>"

        given = ", ".join(f"{name}={text(value)}" for name, value in self.arguments.items())
        return f"torch.ops.{self.schema.name.replace('::', '.')}({given})"

    def group_shape(self) -> list[int]:
        axes = range(self.batch_dims, len(self.shape)) if self.groups is None else sorted(self.groups)
        return [self.shape[d] for d in axes]

    def fitting(self, argument: Any) -> Any:
        """What fits the other arguments, by the argument's name; a default where the name says nothing."""
        source, name, kind = self.source, argument.name, str(argument.type)
        shape, compute = self.shape, compute_dtype(self.dtype)
        cells = math.prod([*shape[: self.batch_dims], *self.group_shape()])
        averaged = self.reduction in ("batchmean", "sum", "mean")
        absent = {
            "second": self.packed,
            "prior_mu": not self.prior,
            "prior_logvar": not self.prior,
            "balance": not self.prior or source.below(2) == 1,
            "free_bits": self.threshold != "free_bits",
            "free_bits_per_group": self.threshold != "free_bits_per_group",
            "weight": not averaged or source.below(2) == 1,
        }
        if absent.get(name, kind.startswith("Optional") and source.below(4) == 3):
            return None
        if name == "first" and self.packed:
            return tensor(source, [2 * n if d == self.dim else n for d, n in enumerate(shape)], self.dtype)
        if name in ("first", "second", "prior_mu", "prior_logvar", "like"):
            return tensor(source, shape, self.dtype)
        if name == "grad_z":
            return tensor(source, shape if self.samples is None else [self.samples, *shape], self.dtype)
        if name == "grad_kl":
            of = {"none": shape[: self.batch_dims], "elementwise": shape}
            return tensor(source, of.get(self.reduction, []), compute)
        if name in ("grad_kl_per_group", "free_bits_per_group"):
            t = tensor(source, self.group_shape(), compute)
            return t.abs() if name.startswith("free") else t
        if name == "gate":
            return torch.ones(source.choice((math.prod(self.group_shape()), 1)), dtype=compute)
        if name == "open":
            return torch.full((source.choice((0, (cells + 7) // 8)),), 0x5A, dtype=torch.uint8)
        if name == "weight":
            return tensor(source, shape[: self.batch_dims], torch.float32).abs()
        if name == "rng":
            return torch.tensor([struct.unpack("<q", source.take(8))[0], 8])
        if name == "clamp":
            return source.choice(STRINGS["clamp"]) if averaged else "sample"
        fixed = {
            "dim": self.dim,
            "batch_dims": self.batch_dims,
            "group_dims": self.groups,
            "reduction": self.reduction,
            "num_samples": self.samples,
            "logvar_bounds": [-3.0, 2.0],
            "prior_grads": self.prior,
            "group_sums": False,
            "generator": None,
        }
        if name in fixed:
            return fixed[name]
        if name in STRINGS:
            return source.choice(STRINGS[name])
        if kind == "bool":
            return source.below(4) != 3
        if "float" in kind:
            return source.choice((0.5, 0.0, 1.0))
        if "int" in kind.lower():
            return source.below(40)
        return argument.default_value if argument.has_default_value() else tensor(source, shape, self.dtype)

    def odd(self, name: str, value: Any) -> Any:
        source = self.source
        if isinstance(value, Tensor):
            what = source.below(9)
            if what == 0:
                return value.to("meta")
            if what == 1:
                return value.to(source.choice(ODD_DTYPES))
            if what == 2:
                return value.reshape(-1)[:0]
            if what == 3:
                return value.unsqueeze(source.below(value.dim() + 1))
            if what == 4:
                return value[0] if value.dim() and value.shape[0] else value.unsqueeze(0)
            if what == 5:
                return torch.tensor(source.choice(SPECIAL), dtype=torch.float64).to(value.dtype)
            if what == 6:
                return value.detach().requires_grad_() if value.is_floating_point() else value
            if what == 7:
                return None
            shape = [source.choice((2, 3, 1, 0, 4)) for _ in range(source.below(4))]
            return tensor(source, shape, self.dtype)
        if isinstance(value, str):
            return source.choice((*STRINGS["reduction"], *STRINGS["clamp"], "", "\0", "x" * 300, "std"))
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return source.choice(NUMBERS)
        if isinstance(value, float):
            return source.choice(SPECIAL)
        if isinstance(value, (list, tuple)):
            return [
                source.choice(NUMBERS[:7] if name != "logvar_bounds" else SPECIAL)
                for _ in range(source.below(5))
            ]
        # None: whatever the schema may take there
        kind = next(str(a.type) for a in self.schema.arguments if a.name == name)
        if "Tensor" in kind:
            shape = [source.choice((2, 3, 1, 0, 4)) for _ in range(source.below(4))]
            return tensor(source, shape, source.choice((self.dtype, torch.float32, torch.float64)))
        if "List[float]" in kind:
            return [source.choice(SPECIAL) for _ in range(source.below(4))]
        if "List[int]" in kind:
            return [source.choice(NUMBERS[:7]) for _ in range(source.below(4))]
        if "float" in kind:
            return source.choice(SPECIAL)
        if "int" in kind.lower():
            return source.choice(NUMBERS)
        return None

    def run(self) -> list[Tensor]:
        operator = getattr(torch.ops.vaekernels, self.schema.name.partition("::")[2])
        positional = [self.arguments[a.name] for a in self.schema.arguments if not a.kwarg_only]
        keywords = {a.name: self.arguments[a.name] for a in self.schema.arguments if a.kwarg_only}
        returned = operator(*positional, **keywords)
        every = [returned] if isinstance(returned, Tensor) else list(returned)
        return [t for t in every if isinstance(t, Tensor)]


def _unwritten(t: Tensor, given: set[int]) -> bool:
    """Whether `t` holds the allocator's filling: one such number of 4 or 8 bytes, nothing else of 2 bytes."""
    filling = UNWRITTEN.get(t.dtype.itemsize)
    if not t.is_floating_point() or filling in given or t.numel() == 0:
        return False
    same = t.view(WORDS[t.dtype.itemsize]) == filling
    return bool(same.any()) if t.dtype.itemsize > 2 else bool(same.all()) and t.numel() > 3


def check(data: bytes) -> str:
    """Raises `Finding`; returns what was seen: "returned" or "raised"."""
    call = Call(data)
    given = [t for t in call.arguments.values() if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [storage_of(t).clone() if t.dtype.itemsize in WORDS else None for t in given]
    try:
        first = call.run()
    except REFUSALS:
        return "raised"
    for t, bits in zip(given, before, strict=True):
        if bits is not None and not torch.equal(storage_of(t), bits):
            raise Finding(f"{call} changed an argument")
    shown = [t.detach() for t in first if t.device.type == "cpu"]
    # Numbers that were given may come out again.
    values = {v for t in given if t.dtype.itemsize in WORDS for v in storage_of(t).flatten().tolist()}
    for t in shown:
        if _unwritten(t, values):
            raise Finding(f"{call} returned memory that nobody wrote")
    if "_draw" not in call.schema.name and call.schema.name != "vaekernels::_rng_state":
        again = [t.detach() for t in call.run() if t.device.type == "cpu"]
        if len(shown) != len(again) or not all(same_bits(a, b) for a, b in zip(shown, again, strict=True)):
            raise Finding(f"{call} gives other bits the second time")
    return "returned"
