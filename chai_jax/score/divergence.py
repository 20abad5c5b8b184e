"""The Kullback-Leibler divergence of next-token distributions: what training, the planner, gates and `verify` share."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def kl_divergence(first: Float[Array, "*B V"], second: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(first || second) in nats, of distributions that are given as log-probabilities over the vocabulary."""
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)
