"""Quantizers: `(latents [B N D], *, train=False) -> Codes`, and `lookup(indices) -> z`. One idea, one file."""
