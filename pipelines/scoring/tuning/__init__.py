"""What `raydit tune` measures: candidates, their errors, and the outcome."""
