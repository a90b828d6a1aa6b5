"""Decoders: `(codes, *, target, context=None, train=False) -> Decoded`, and `sample(codes, rng, ...) -> x`."""
