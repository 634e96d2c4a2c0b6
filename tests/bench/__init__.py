"""Benchmarks: ratios against a peer or a bare lower bound in the same run."""
