"""What a user does first: a fused loss, then `vaekernels doctor`. The last line it prints is JSON."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import warnings

import torch

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import vaekernels as vk

    mu = torch.linspace(-2, 2, 512).reshape(64, 8).requires_grad_()
    logvar = torch.linspace(-1, 1, 512).reshape(64, 8).requires_grad_()
    z, kl, rate = vk.sample_kl(mu, logvar, free_bits=0.25)
    (z.sum() + kl).backward()

expected = (0.5 * (mu**2 + logvar.exp() - 1 - logvar)).mean(0).clamp(min=0.25).sum()
torch.testing.assert_close(kl, expected)
assert torch.isfinite(mu.grad).all() and torch.isfinite(logvar.grad).all()

from vaekernels import cli  # noqa: E402 (as the command does, after the package was used)

shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    status = cli.main(["doctor"])
facts = cli.diagnosis()
print(
    json.dumps(
        {
            "kernels": facts["cpu"]["kernels"],
            "cuda": facts["cuda"]["kernels"],
            "status": status,
            "warning": "\n".join(str(w.message) for w in seen if w.category is vk.FallbackWarning),
            "doctor": shown.getvalue(),
            "versions": {
                "python": platform.python_version(),
                "torch": facts["torch"]["version"],
                "CUDA": facts["torch"]["cuda"] or "none",
                "architectures": facts["cuda"]["architectures"] or "",
            },
        }
    )
)
