"""Fitting the weights of one diffusion transformer to another configuration, part by part."""
