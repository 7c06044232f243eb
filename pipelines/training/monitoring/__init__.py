"""What the driver makes of the workers' messages: metrics, previews, and which checkpoints stay."""
