"""Shared blocks: they import nothing of jaxtok, and every other room may import them."""
