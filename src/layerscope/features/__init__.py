"""Features: sparse dictionaries over activations, and what reads and edits them."""
