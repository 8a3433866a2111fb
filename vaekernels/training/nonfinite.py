"""Which part of a step is to blame for a NaN or an inf."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vaekernels.training.latents import Terms

__all__ = ["Offender", "blame_gradients", "blame_terms", "largest"]


class Offender(NamedTuple):
    """``size``: how bad it is; what is not finite is inf."""

    size: float
    text: str


def blame_terms(model: nn.Module, terms: Terms, weight: Tensor, rows: Tensor) -> Offender:
    """The largest offender in the forward pass: a parameter that is not finite itself, else the weight of the
    KL if it is not, else the example with the largest NLL or KL. ``rows``: the training examples in the rows
    of the batch."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return Offender(torch.inf, f"parameter {name} holds {_count(parameter)}")
    if not bool(weight.isfinite()):
        return Offender(torch.inf, f"the weight of the KL is {weight.item():g}")
    candidates = [("NLL", terms.nll_per_example)]
    for number, layer in enumerate(terms.drawn):
        name = "KL" if len(terms.drawn) == 1 else f"KL of layer {number}"
        candidates.append((name, layer.kl_per_example()))
    offenders: list[Offender] = []
    for name, values in candidates:
        size, row = _worst(values)
        text = f"{name} {values[row].item():g} of training example {rows[row]} (row {row} of the batch)"
        offenders.append(Offender(size, text))
    return max(offenders, key=lambda found: found.size)


def blame_gradients(model: nn.Module) -> Offender:
    """The parameter with the largest gradient."""
    found = Offender(-1.0, "no gradient")
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        size, _ = _worst(parameter.grad.flatten().abs())
        if size > found.size:
            said = f"holds {_count(parameter.grad)}" if size == torch.inf else f"reaches {size:g}"
            found = Offender(size, f"the gradient of {name} {said}")
    return found


def largest(own: Offender) -> Offender:
    """The largest over all processes, each of which gives its own."""
    if not dist.is_initialized():
        return own
    everyone: list[Offender] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    size, text = max(everyone, key=lambda offender: offender[0])
    return Offender(size, text)


def _worst(values: Tensor) -> tuple[float, int]:
    """(size, index) of the largest value; NaN counts as inf."""
    row = int(torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf).argmax())
    value = float(values[row].item())
    return (value if value == value else torch.inf), row


def _count(values: Tensor) -> str:
    bad = int((~values.isfinite()).sum())
    return f"{bad} NaN or inf among {values.numel()} values"
