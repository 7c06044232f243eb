"""Compatibility: the name under which models that MLflow holds import the sampler.

A promoted model brings its own copy of served_model.py, which runs with the raydit that is installed where the model
is loaded. Copies made up to commit 707a9da import `pipelines.sampling.Sampler`, `pipelines.grids.png_of` and
`pipelines.sample.class_label`; these names stay importable for them, and nothing else uses them.
"""

from pipelines.scoring.samples.checkpoint_sampler import CheckpointSampler as Sampler

__all__ = ["Sampler"]
