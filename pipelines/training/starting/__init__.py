"""What a training begins with: fresh weights or those of a checkpoint, an adapter, new data, a longer schedule."""
