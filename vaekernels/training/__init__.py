"""The reference trainer: configuration, data, models, the loop, held-out evaluation. Needs
vaekernels[train]."""
