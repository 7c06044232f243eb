"""Compatibility: the name under which models that MLflow holds import png_of; see pipelines/sampling.py."""

from pipelines.images.grids import encode_png as png_of

__all__ = ["png_of"]
