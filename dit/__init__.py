"""The diffusion transformer: models, objectives, samplers, checkpoints and the training loop, in plain torch."""
