"""What a recipe's stages need and take, before anything runs: `raydit plan` and `raydit encode --dry-run`."""
