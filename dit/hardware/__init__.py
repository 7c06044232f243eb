"""Accelerators: published peaks, the measured peak of a device, speeds that were measured, and devices that fail."""
