"""Is log_likelihood what it should be, a log-likelihood in nats, summed over the data dimensions?"""

from __future__ import annotations

from torch import Tensor

from vaekernels.collapse.estimate import Estimate
from vaekernels.collapse.examples import Examples
from vaekernels.collapse.measurements import Measurements
from vaekernels.collapse.verdict import EPS_GLOBAL, ends

__all__ = ["check"]

FLAT = 10.0
"""Temperature of I_dec from which a likelihood may be a mean: the decoder reads z as if its log-likelihood
were so many times larger."""


def check(split: Measurements, shuffled: Estimate | None, decoded: Estimate | None) -> None:
    """ValueError where ``log_likelihood`` has the wrong sign or is a mean over the data dimensions.

    A negative log-likelihood prefers other examples' codes to the own one: Delta_shuffle is below 0, and the
    InfoNCE bound that is 0 with it is above 0.1 nat with its negative. A mean over 784 pixels tells the
    examples apart at a temperature of about 784, which I_dec finds, and its NLL is that of one pixel: less
    than half a nat for every data dimension of an example, where a sum has about one. Of a likelihood in nats
    another example's code costs as much as can be read from z, or more; of a mean it costs less. (A decoder
    with too large a variance is flat as well, but there the cost is large.)
    """
    contrasts = split.contrasts
    if contrasts is None or shuffled is None or decoded is None:
        return
    if shuffled.high < 0:
        turned = split.subset(len(split.columns["i_dec"])).estimate(contrasts.negated().resample)
        if turned.low > EPS_GLOBAL:
            raise ValueError(
                f"log_likelihood has the wrong sign: another example's code explains an example better than "
                f"its own (Δ_shuffle {ends(shuffled)}), and with its negative the decoder reads "
                f"{ends(turned)} nats from z. Return log p(x|z), not the loss -log p(x|z)"
            )
    size = _size(split.x)
    tau = min(split.tau or (0.0,))
    nll = split.columns["nll"].mean().item()
    flat = tau >= max(FLAT, size / 5) and abs(nll) < size / 2
    if flat and decoded.low > EPS_GLOBAL and shuffled.high < decoded.high:
        raise ValueError(
            f"log_likelihood is too flat to be a sum over the {size} values of an example, in nats: "
            f"the NLL is {nll:.3g}, another example's code costs {ends(shuffled)}, but the "
            f"codes are told apart (I_dec {ends(decoded)}) as if it were {tau:.3g} times larger. Return the "
            f"sum over the data dimensions, not their mean; a squared error needs its factor 1 / (2 variance)"
        )


def _size(x: Examples) -> int:
    """Values in one example, of the largest tensor."""
    parts: tuple[Tensor, ...] = (x,) if isinstance(x, Tensor) else x
    return max(part[0].numel() for part in parts)
