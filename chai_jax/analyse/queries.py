"""Which queries of a key head look at the same tokens: clusters within each head of a model with grouped queries.

The queries of a head read one key and one value. So those that attend alike can share their attention and are merged
for good (see `chai_jax.compress.slice.merged_queries`). They are compared as heads are: by the correlation of their
attention.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from chai_jax.analyse.cluster import Clusters, clusters_of, medoid
from chai_jax.analyse.probe import Probe, correlation_of
from chai_jax.compress.slice import of_heads
from chai_jax.errors import InputError
from chai_jax.plans.queries import QueryClusters


def query_clusters(probe: Probe, count: int | None, seed: int = 0) -> list[QueryClusters]:
    """For each layer, the queries of every key head in `count` clusters, each led by its medoid; () where all stay
    (None: all do).

    Merges of key heads pair the queries of two heads by their order. So the clusters of a head come in the order in
    which the queries that lead them correlate best, in sum, with those of the layer's first head.

    Raises:
        InputError: a count that cannot be, or a probe that records no queries.
    """
    if count is None:
        return [()] * len(probe.attention)
    heads = probe.attention.shape[1]
    if probe.queries is None:
        raise InputError(
            f"queries is {count}, and the probe records none apart: expected the probe of a model with several queries "
            "for each key head, made by this version: probe again, or leave queries out"
        )
    each = probe.queries.shape[1] // heads
    if not 1 <= count <= each:
        raise InputError(f"queries is {count}; expected a number from 1 to {each}, the queries of each key head")
    if count == each:
        return [()] * len(probe.queries)
    at, found = _heads(heads, each), []
    for own in correlation_of(probe.queries):
        clusters = [_clusters(own[np.ix_(head, head)], count, seed) for head in at]
        kept = [[head[one[0]] for one in mine] for head, mine in zip(at, clusters, strict=True)]
        pairs = (linear_sum_assignment(own[np.ix_(kept[0], mine)], maximize=True) for mine in kept)
        found.append(tuple(tuple(mine[to] for to in order) for mine, (_, order) in zip(clusters, pairs, strict=True)))
    return found


def of_kept(probe: Probe, clusters: Sequence[QueryClusters]) -> Probe:
    """The probe as if each head had the queries alone that stand for its clusters: by those its heads compare."""
    if probe.queries is None or not any(clusters):
        return probe
    heads = probe.attention.shape[1]
    at = _heads(heads, probe.queries.shape[1] // heads)
    attention = probe.attention.copy()
    for layer, own in enumerate(clusters):
        if own:
            # [H, n']: where the kept queries are; those of two heads are compared one by one, in their order.
            kept = np.asarray([[at[head][one[0]] for one in own[head]] for head in range(heads)])
            attention[layer] = sum(probe.queries[layer][np.ix_(place, place)] for place in kept.T)
    return dataclasses.replace(probe, attention=attention)


def _heads(heads: int, each: int) -> list[list[int]]:
    return [of_heads([head], each) for head in range(heads)]


def _clusters(correlation: Float[np.ndarray, "n n"], count: int, seed: int) -> Clusters:
    """As many clusters as wanted, also where queries coincide and K-Means would find fewer; each led by its medoid."""
    found = list(clusters_of(correlation, count, seed))
    while len(found) < count:
        largest = max(found, key=len)
        found.remove(largest)
        found += [largest[:-1], largest[-1:]]
    kept = [(medoid(correlation, one), one) for one in sorted(found)]
    return tuple((first, *(query for query in one if query != first)) for first, one in kept)
