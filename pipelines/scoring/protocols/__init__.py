"""The protocol of an evaluation: from a recipe, a checkpoint, or a file."""
