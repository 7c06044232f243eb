"""Training: the loop of a worker, its batches, and what the driver does meanwhile."""
