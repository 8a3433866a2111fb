"""The examples of a diagnosis: selected from tensors or a Dataset, moved, hashed. The types of the model's
two functions, and the adapter for latents that are not vectors."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
from collections.abc import Callable, Sequence, Sized
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

__all__ = [
    "Encode",
    "Examples",
    "LogLikelihood",
    "Prior",
    "digest",
    "flatten_latents",
    "select",
    "take",
    "whiten_latents",
]

Examples: TypeAlias = Tensor | tuple[Tensor, ...]
"""A tensor, or several with the same examples along their first axes."""

_HASHED = 1 << 10
_COMPARED, _NEIGHBOURS, _PROJECTED = 1 << 10, 32, 64
GAP = 50.0
"""How many times farther than the j-th neighbour the next one is, from which an example has near-copies. Of
independent examples that lie in d dimensions, with any density, one in 50^(j d) has such a gap."""
MINIMUM = 4  # examples: fewer give no interval worth the name


class Encode(Protocol):
    """x -> (mu, logvar), [B, D] each: q(z|x) = N(mu, diag exp(logvar))."""

    def __call__(self, x: Any, /) -> tuple[Tensor, Tensor]: ...


class LogLikelihood(Protocol):
    """(x, z) -> log p(x|z) in nats, summed over data dimensions, [B]."""

    def __call__(self, x: Any, z: Tensor, /) -> Tensor: ...


def count(x: Examples) -> int:
    return len(x) if isinstance(x, Tensor) else len(x[0])


def take(x: Examples, rows: Tensor | slice) -> Examples:
    """The examples at ``rows``, on the device they are on."""
    if isinstance(x, Tensor):
        return x[rows if isinstance(rows, slice) else rows.to(x.device)]
    return tuple(part[rows if isinstance(rows, slice) else rows.to(part.device)] for part in x)


def to_device(x: Examples, device: torch.device | str | None) -> Examples:
    if device is None:
        return x
    return x.to(device) if isinstance(x, Tensor) else tuple(part.to(device) for part in x)


def select(name: str, data: object, n: int, generator: torch.Generator) -> Examples:
    """At most ``n`` examples of ``data``, at random and in random order.

    A Dataset's items are collated as a DataLoader does; of one without a length the first ``n`` are taken.
    TypeError for anything that is no tensor, tuple of tensors or Dataset of tensors (or numbers) or of tuples
    of them; ValueError for fewer than 4 examples or tensors of different lengths.
    """
    if isinstance(data, list):
        data = tuple(data)
    if isinstance(data, Tensor) or (isinstance(data, tuple) and data and _all_tensors(data)):
        tensors = _same_length(name, data)
        return take(tensors, _chosen(name, count(tensors), n, generator))
    if isinstance(data, Dataset):
        if isinstance(data, Sized):
            items = [data[i] for i in _chosen(name, len(data), n, generator).tolist()]
        else:
            items = list(itertools.islice(iter(data), n))
            _enough(name, len(items))
        collated = default_collate(items)
        tensors = tuple(collated) if isinstance(collated, list | tuple) else collated
        if isinstance(tensors, Tensor) or (isinstance(tensors, tuple) and _all_tensors(tensors)):
            return tensors
        raise TypeError(
            f"{name}: the items of a Dataset must be tensors or tuples of tensors, got "
            f"{type(items[0]).__name__}; wrap it in a Dataset that returns them"
        )
    raise TypeError(
        f"{name} must be a tensor, a tuple of tensors or a torch Dataset, got {type(data).__name__}"
    )


def copies(x: Examples) -> float:
    """The share of the examples that are equal to an earlier one, bit by bit."""
    parts: tuple[Tensor, ...] = (x,) if isinstance(x, Tensor) else x
    seen: set[bytes] = set()
    for a in range(0, count(x), _HASHED):
        rows = [part[a : a + _HASHED].detach().cpu().contiguous() for part in parts]
        for i in range(len(rows[0])):
            found = hashlib.sha256()
            for part in rows:
                found.update(ctypes.string_at(part[i].data_ptr(), part[i].nbytes))
            seen.add(found.digest())
    return 1 - len(seen) / count(x)


def near_copies(x: Examples) -> float:
    """The share of the examples that have others beside them, 32 at most, and all the rest at least
    :data:`GAP` times as far: near-copies, or tight clusters of a few. Of the first 1024 examples, by the
    Euclidean distance of their real numbers, or of 64 random projections of these, which keep distances to a
    tenth. Equal examples count as one."""
    parts: tuple[Tensor, ...] = (x,) if isinstance(x, Tensor) else x
    first = [part[:_COMPARED].detach() for part in parts if part.is_floating_point()]
    real = [part.reshape(len(part), -1) for part in first]  # one number an example may have no axis
    if not real:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    points = torch.zeros(len(real[0]), 0, dtype=torch.float64)
    for part in real:
        if part.shape[1] > _PROJECTED:
            directions = torch.randn(part.shape[1], _PROJECTED, generator=generator) / _PROJECTED**0.5
            part = part.float() @ directions.to(part.device)
        points = torch.cat([points, part.cpu().double()], dim=1)
    # Not by the products of the points: those of near-copies cancel.
    far = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    far = torch.where(far > 0, far, torch.inf)
    nearest = far.topk(min(_NEIGHBOURS + 1, len(far)), largest=False).values
    gaps = nearest[:, 1:] / nearest[:, :-1]
    return (gaps.isfinite() & (gaps >= GAP)).any(dim=1).double().mean().item()


def labels_of(
    name: str, labels: object, data: object, n: int, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """The labels of the examples that :func:`select` chooses with such a generator: numbers from 0, int64
    [n], and what the numbers stand for.

    TypeError for what is no tensor, array or sequence of numbers; ValueError unless there is one an example.
    """
    try:
        given = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be numbers, one for each example, got {type(labels).__name__}: {error}"
        ) from error
    data = tuple(data) if isinstance(data, list) else data
    if isinstance(data, Tensor | tuple):
        available = count(data)
    else:
        available = len(data) if isinstance(data, Sized) else len(given)
    if given.dim() != 1 or len(given) != available:
        raise ValueError(
            f"{name} must have one label for each of the {available} examples, got shape {list(given.shape)}"
        )
    chosen = torch.arange(available)[:n]
    if isinstance(data, Sized):
        chosen = _chosen(name, available, n, generator)
    values, numbers = torch.unique(given[chosen], return_inverse=True)
    return numbers, [f"{value:g}" if isinstance(value, float) else str(value) for value in values.tolist()]


def digest(x: Examples) -> str:
    """sha256 of types, shapes and bytes."""
    found = hashlib.sha256()
    for part in (x,) if isinstance(x, Tensor) else x:
        found.update(f"{part.dtype}{list(part.shape)}".encode())
        values = part.detach().cpu().contiguous()
        found.update(ctypes.string_at(values.data_ptr(), values.nbytes))  # NumPy is no dependency of the core
    return found.hexdigest()


def flatten_latents(
    encode: Encode, log_likelihood: LogLikelihood, latent_shape: Sequence[int]
) -> tuple[Encode, LogLikelihood]:
    """The two functions of a model whose latents are ``[B, *latent_shape]``, as functions of latents [B, D].

    D is the product of ``latent_shape``; the axes after the batch axis are flattened in their order, so that
    dimension d of the diagnosis is element ``torch.unravel_index(d, latent_shape)`` of the latent::

        encode, log_likelihood = collapse.flatten_latents(vae.encode, vae.log_likelihood, (4, 8, 8))
        report = collapse.diagnose(encode, log_likelihood, heldout)

    ValueError, when called, if ``encode`` returns another shape.
    """
    shape = tuple(int(size) for size in latent_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"latent_shape must be one or more positive sizes, got {latent_shape!r}")

    def flat_encode(x: Any, /) -> tuple[Tensor, Tensor]:
        mu, logvar = encode(x)
        for part in (mu, logvar):
            if tuple(part.shape[1:]) != shape:
                raise ValueError(
                    f"latent_shape is {list(shape)}, but encode returned [B, ...] of {list(part.shape)}"
                )
        return mu.flatten(1), logvar.flatten(1)

    def flat_log_likelihood(x: Any, z: Tensor, /) -> Tensor:
        return log_likelihood(x, z.reshape(len(z), *shape))

    return flat_encode, flat_log_likelihood


Prior: TypeAlias = tuple[Tensor, Tensor] | Callable[[Any], tuple[Tensor, Tensor]]
"""(mu, logvar) of p(z) = N(mu, diag exp(logvar)), [D] each, or a function of x that gives those of p(z|x),
[B, D] each."""


def whiten_latents(
    encode: Encode, log_likelihood: LogLikelihood, prior: Prior
) -> tuple[Encode, LogLikelihood]:
    """The two functions of a model with a Gaussian prior of its own, as functions of the latent in which that
    prior is N(0, I): z' = (z - mu_p) / sd_p.

    ``prior``: (mu_p, logvar_p), [D] each, of a learned prior that is the same for every example, or a
    function of x that returns them, [B, D] each: a conditional prior, p(z|x), where x has what it depends on.
    KL divergences, information and likelihoods are those of z. Another example's code is shuffled as its
    place relative to the prior. ValueError, when called, if the shapes do not fit.
    """

    def moments(x: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = prior(x) if callable(prior) else prior
        found = []
        for name, part in (("mu", mu), ("logvar", logvar)):
            if part.shape not in (like.shape, like.shape[1:]):
                raise ValueError(
                    f"the {name} of prior must be of shape {list(like.shape[1:])}, or {list(like.shape)} as "
                    f"a function of x, got {list(part.shape)}"
                )
            found.append(part.detach().to(device=like.device, dtype=like.dtype))
        return found[0], found[1]

    def white_encode(x: Any, /) -> tuple[Tensor, Tensor]:
        mu, logvar = encode(x)
        mu_p, logvar_p = moments(x, mu)
        return (mu - mu_p) * torch.exp(-0.5 * logvar_p), logvar - logvar_p

    def white_log_likelihood(x: Any, z: Tensor, /) -> Tensor:
        mu_p, logvar_p = moments(x, z)
        return log_likelihood(x, mu_p + torch.exp(0.5 * logvar_p) * z)

    return white_encode, white_log_likelihood


def _all_tensors(parts: Sequence[object]) -> bool:
    return all(isinstance(part, Tensor) for part in parts)


def _same_length(name: str, data: Any) -> Examples:
    parts: tuple[Tensor, ...] = (data,) if isinstance(data, Tensor) else data
    shapes = [list(part.shape) for part in parts]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{name} must have its examples along the first axis, equally many in every tensor, got shapes "
            f"{', '.join(map(str, shapes))}"
        )
    return parts[0] if isinstance(data, Tensor) else parts


def _chosen(name: str, available: int, n: int, generator: torch.Generator) -> Tensor:
    _enough(name, available)
    return torch.randperm(available, generator=generator)[:n]


def _enough(name: str, available: int) -> None:
    if available < MINIMUM:
        raise ValueError(
            f"{name} must have at least {MINIMUM} examples, got {available}; a verdict needs hundreds"
        )
