"""Which queries of each head are merged: what a plan says of them, and what of it cannot be."""

from chai_jax.errors import InputError
from chai_jax.inputs.fields import Number, brief

# For each key and value head the clusters of its queries; of a cluster the numbers of its queries in the head, the one
# that represents it first.
QueryClusters = tuple[tuple[tuple[Number, ...], ...], ...]


def check_queries(where: str, heads: int, given: QueryClusters) -> None:
    """Each query of each head is in one cluster, and all heads have as many queries, in as many clusters.

    Args:
        where: what messages call the layer.
        heads: key and value heads of the layer.

    Raises:
        InputError: naming what cannot be.
    """
    if given and len(given) != heads:
        raise InputError(
            f"{where} has query_clusters of {len(given)} heads; expected an entry for each of its {heads} heads"
        )
    shapes = []
    for head, clusters in enumerate(given):
        queries = sorted(query for one in clusters for query in one)
        if not queries or not all(clusters) or queries != list(range(len(queries))):
            raise InputError(
                f"{where}.query_clusters[{head}] is {brief(clusters)}; expected each query of the head, from 0 on, in "
                "exactly one cluster"
            )
        shapes.append((len(clusters), len(queries)))
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise InputError(
            f"{where}.query_clusters has {shapes[0][0]} clusters of {shapes[0][1]} queries for one head, {other[0]} of "
            f"{other[1]} for another; expected the same for every head"
        )
