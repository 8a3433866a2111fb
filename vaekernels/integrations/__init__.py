"""vaekernels inside other libraries. Import the one you need; each needs its library, and no other::

    from vaekernels.integrations import diffusers            # patch(), unpatch()
    from vaekernels.integrations import torch_distributions  # Normal, register(), unregister()
    from vaekernels.integrations import scvi                 # patch(), unpatch()
    from vaekernels.integrations import pyro                 # Normal
    from vaekernels.integrations import pythae               # VAE, BetaVAE, ..., vae_loss
    from vaekernels.integrations import lightning            # CollapseMonitor
    from vaekernels.integrations import monai                # patch(), unpatch(), kl_loss
    from vaekernels.integrations import multivae             # patch(), unpatch()
    from vaekernels.integrations import torchrl              # DreamerModelLoss

`torch_distributions` needs torch alone. ``pip install 'vaekernels[integrations]'`` installs all of
them but multivae, which needs a torchvision that fits the torch in use.
"""
