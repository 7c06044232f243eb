"""How images are scored: feature extractors, mergeable statistics, metrics, references, protocol, report."""
