"""Diffusion transformers in plain torch: models, objectives, samplers, checkpoints and the training loop."""
