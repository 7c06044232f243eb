"""Accelerators: published peaks, the measured peak of a device, and speeds that were measured."""
