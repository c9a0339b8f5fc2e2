"""TransformerLens: a `HookedTransformer` or `TransformerBridge` that is already built."""
