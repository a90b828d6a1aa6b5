"""Codecs: what turns pixels into what the encoder sees, and back. They own the pixel range."""
