"""The recipe: its dataclasses, and the reader that validates a TOML file."""
