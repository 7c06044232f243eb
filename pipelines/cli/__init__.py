"""The `raydit` command: what it parses, submits and prints."""
