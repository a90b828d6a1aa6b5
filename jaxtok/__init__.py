"""jaxtok: visual tokenizers in JAX, each a composition of a few parts and one config."""

__version__ = "0.1.0"
