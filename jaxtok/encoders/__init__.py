"""Encoders: `(x [B h w C], *, context=None, train=False) -> latents [B N D]`. One idea, one file."""
