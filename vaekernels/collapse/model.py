"""The two functions that a model is here, behind checks and in batches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vaekernels.collapse.budget import Pace
from vaekernels.collapse.examples import Encode, Examples, LogLikelihood, count, take, to_device

__all__ = ["BATCH", "Model", "NotFiniteError", "moments", "require_finite"]

BATCH = 256
"""Examples in one call of either function, unless told otherwise."""
CPU_BATCH, ACCELERATOR_BATCH = 128, 512
"""Those of a diagnosis. A GRU decoder with 2000 words evaluates 1.6 times as many examples a second in
batches of 128 as of 256 on a CPU core, whose cache holds the former's logits."""

TRIED = 64
"""Examples on which the functions are tried before the work begins."""
_LEAST = 32
_EQUAL = 1e-3  # relative: more than the order of additions changes, less than dropout does
_SAME = 0.05  # of the spread over examples: more than another batch size changes, less than batch norm does


class Model:
    """``encode`` and ``log_likelihood`` of somebody's model, without gradients, in batches of ``batch_size``
    (None: by the device that codes are on).

    Latents are handed to ``log_likelihood`` in the dtype and on the device in which ``encode`` returns them,
    examples on ``device`` (None: where they are). ``counted`` is told of every batch evaluated.
    """

    def __init__(
        self,
        encode: Encode,
        log_likelihood: LogLikelihood,
        *,
        device: torch.device | str | None = None,
        batch_size: int | None = BATCH,
        counted: Callable[[int], None] = lambda evaluations: None,
    ) -> None:
        self.encode = encode
        self.log_likelihood = log_likelihood
        self.device = device
        self._batch_size = batch_size
        self.encoded = 0
        self.dims = 0
        self.dtype = torch.get_default_dtype()
        self.latent_device = torch.device("cpu")
        self.counted = counted

    @property
    def batch_size(self) -> int:
        return self._usual_batch() if self._batch_size is None else self._batch_size

    def _usual_batch(self) -> int:
        return CPU_BATCH if self.latent_device.type == "cpu" else ACCELERATOR_BATCH

    def moments(self, x: Examples, enough: Callable[[], bool] = lambda: False) -> tuple[Tensor, Tensor]:
        """mu and logvar, of the first examples alone where it was ``enough`` after a batch of 32 or more."""
        mu, logvar = moments(self.encode, x, device=self.device, batch_size=self.batch_size, enough=enough)
        self.encoded += len(mu)
        self.dims = mu.shape[1]
        self.dtype, self.latent_device = mu.dtype, mu.device
        return mu, logvar

    @torch.no_grad()
    def log_likelihoods(
        self, x: Examples, total: int, rows: Callable[[int, int], Tensor], codes: Callable[[int, int], Tensor]
    ) -> Tensor:
        """log p(x[rows]|codes) of ``total`` pairs, float64 [total] on the CPU; ``rows(a, b)`` and
        ``codes(a, b)`` give those from a to b."""
        values = torch.empty(total, dtype=torch.float64)
        for a in range(0, total, self.batch_size):
            b = min(a + self.batch_size, total)
            values[a:b] = self.evaluate(take(x, rows(a, b)), codes(a, b)).double().cpu()
            self.counted(b - a)
        return values

    def nll(self, x: Examples, codes: Callable[[int, int], Tensor]) -> Tensor:
        """-log p(x_i|code_i) of every example, float64 [N]."""
        return -self.log_likelihoods(x, count(x), torch.arange, codes)

    def evaluate(self, x: Examples, z: Tensor) -> Tensor:
        """log p(x|z) of one batch, as ``log_likelihood`` gives it. ValueError if that is not [B]."""
        value = self.log_likelihood(
            to_device(x, self.device), z.to(device=self.latent_device, dtype=self.dtype)
        )
        if not isinstance(value, Tensor) or value.shape != (len(z),):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"log_likelihood must return one value per example, shape [{len(z)}], got {got}; sum over "
                f"the data dimensions"
            )
        return value

    def hurry(self, seconds: float, pace: Pace) -> None:
        """Batches that take so long at most, as far as single examples do."""
        self._batch_size = max(1, min(self._usual_batch(), int(seconds / max(*pace, 1e-12))))

    @torch.no_grad()
    def check(self, x: Examples, examples: int = TRIED) -> Pace:
        """ValueError if a function answers the same question twice in two ways: dropout, batch norm or
        sampling left on. Tried on the first ``examples``; returns how long the functions took."""
        tried = take(x, slice(0, examples))
        half = count(tried) // 2
        mu, logvar = self.moments(tried)
        first = {"encode": torch.cat([mu, logvar], dim=1), "log_likelihood": self.evaluate(tried, mu)}
        times = [time.perf_counter()]
        again = {"encode": torch.cat(self.moments(tried), dim=1)}
        times.append(time.perf_counter())
        again["log_likelihood"] = self.evaluate(tried, mu)
        times.append(time.perf_counter())
        pace = Pace(*((b - a) / count(tried) for a, b in itertools.pairwise(times)))
        small = take(tried, slice(0, half))
        alone = {
            "encode": torch.cat(self.moments(small), dim=1),
            "log_likelihood": self.evaluate(small, mu[:half]),
        }
        self.encoded = 0  # what the measurements take, not these
        for name, values in first.items():
            require_finite(name, values)
            if not torch.allclose(values, again[name], rtol=_EQUAL, atol=_EQUAL * 0.1):
                difference = (values - again[name]).abs().max().item()
                raise ValueError(
                    f"{name} gave different values for the same input twice (by up to {difference:.2g}): "
                    f"dropout or sampling is on. Call eval() on the model before the diagnosis"
                )
            if values.dtype in (torch.float32, torch.float64):
                difference = (values[:half] - alone[name]).abs().max().item()
                if difference > _EQUAL + _SAME * values.std().item():
                    raise ValueError(
                        f"{name} gave different values for the same example in another batch (by up to "
                        f"{difference:.2g}): batch norm is in train mode. Call eval() on the model before "
                        f"the diagnosis"
                    )
        return pace


@torch.no_grad()
def moments(
    encode: Encode,
    x: Examples,
    *,
    device: torch.device | str | None = None,
    batch_size: int = BATCH,
    enough: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor]:
    """mu and logvar of every example, [N, D] each; of the first of them, where after a batch there are 32 and
    it is ``enough``. ValueError if ``encode`` returns anything else."""
    n = count(x)
    mu = logvar = torch.empty(0)
    filled = 0
    for i in range(0, n, batch_size):
        chunk = encode(to_device(take(x, slice(i, i + batch_size)), device))
        if (
            not isinstance(chunk, tuple | list)
            or len(chunk) != 2
            or not all(isinstance(part, Tensor) for part in chunk)
        ):
            raise TypeError(f"encode must return the tensors (mu, logvar), got {type(chunk).__name__}")
        some = min(batch_size, n - i)
        shapes = [tuple(part.shape) for part in chunk]
        if not filled and len(shapes[0]) == 2 and shapes[0] == shapes[1]:
            # Written in place: a list of batches and the whole of them would take twice the memory.
            mu, logvar = (part.new_empty(n, part.shape[1]) for part in chunk)
        if shapes != [(some, mu.shape[-1])] * 2:
            raise ValueError(
                f"encode must return mu and logvar of shape [B, D] each; for {some} examples it gave "
                f"{list(shapes[0])} and {list(shapes[1])}; flatten_latents flattens the latent axes into one"
            )
        mu[i : i + some], logvar[i : i + some] = chunk
        filled += some
        if filled >= _LEAST and enough():
            break
    return mu[:filled], logvar[:filled]


class NotFiniteError(ValueError):
    """A function of the model gave NaN or inf."""


def require_finite(name: str, values: Tensor) -> None:
    """NotFiniteError that counts the examples for which ``name`` is NaN or inf."""
    bad = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
    if bool(bad.any()):
        raise NotFiniteError(
            f"{name} gave NaN or inf for {int(bad.sum())} of {len(values)} examples; no interval can be "
            f"drawn over them"
        )
