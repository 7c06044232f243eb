"""What the driver does with the workers' messages: metrics, previews, and which checkpoints are kept."""
