"""Benchmarks: ratios against peers and plain references, measured side by side in one run."""
