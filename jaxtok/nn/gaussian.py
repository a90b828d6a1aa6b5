"""Diagonal Gaussians, as the encoder of a KL autoencoder gives them (arXiv 1312.6114)."""

import jax.numpy as jnp


def moments(x):
    """[... 2C] -> (mean, logvar), each float32 [... C]; logvar is clamped to [-30, 20]."""
    mean, logvar = jnp.split(x.astype(jnp.float32), 2, -1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def sample(mean, logvar, noise):
    """mean + std * noise, all [...]; noise is standard normal."""
    return mean + jnp.exp(0.5 * logvar) * noise


def kl(mean, logvar):
    """KL divergence from the standard normal, in nats a sample: [B ...] -> [B]."""
    terms = jnp.square(mean) + jnp.exp(logvar) - 1 - logvar
    return 0.5 * terms.sum(tuple(range(1, terms.ndim)))
