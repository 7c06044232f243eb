"""One file for each command of `raydit`, or for each group of commands."""
