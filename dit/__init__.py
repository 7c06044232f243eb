"""The diffusion transformer: models, objectives, samplers, checkpoints, training loop; in plain torch."""
