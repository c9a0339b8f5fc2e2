"""Experiments: what a user runs, from configuration to a typed table and its summary."""
