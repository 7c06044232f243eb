"""Reports, cards and comparisons as HTML pages and Markdown."""
