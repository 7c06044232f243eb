"""The record in config.json of a checkpoint, weights files, and the formats of other projects."""
