"""Hugging Face causal language models as a backend."""
