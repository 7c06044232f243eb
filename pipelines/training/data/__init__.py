"""What training reads: its order and draws, latents or images that are encoded meanwhile, and batches."""
