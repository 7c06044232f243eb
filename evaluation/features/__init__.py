"""The networks behind the extractors, by family: how they are named, loaded, and what they do to images first."""
