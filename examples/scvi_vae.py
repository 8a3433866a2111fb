"""Trains SCVI of scvi-tools on its synthetic cells, the latent layer on the fused ops.

python examples/scvi_vae.py --steps 200
"""

from __future__ import annotations

import argparse

import scvi

from vaekernels.integrations import scvi as fused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps

    scvi.settings.seed = 0
    cells = scvi.data.synthetic_iid()  # 400 cells, 100 genes, 2 batches
    fused.patch()  # the one line that differs
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = scvi.model.SCVI(cells, n_latent=10)
    model.train(max_steps=steps, max_epochs=steps, accelerator="cpu", enable_progress_bar=False)
    for epoch, elbo in model.history["elbo_train"].iterrows():
        if epoch % 10 == 0 or epoch == len(model.history["elbo_train"]) - 1:
            print(f"epoch {epoch:3d}  elbo_train {float(elbo.iloc[0]):8.2f} nats per cell")
    print(f"latent {model.get_latent_representation().shape}")


if __name__ == "__main__":
    main()
