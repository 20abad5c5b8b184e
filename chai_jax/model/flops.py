"""Model FLOPs of an update: with the peak of the devices that do it, how much of a machine training uses.

As PaLM counts (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): a product with N weights costs 2 N per token
forward, 2 N for the gradient of its input and 2 N for that of its weights, 6 N in all; attention costs 2 query heads
(key rank + value rank) per token and layer for each token of its sequence, or of the layer's window, forward, twice
that backward, with no discount for the causal mask. Only what the model asks for counts: real tokens (no padding), no
layer computed again (`remat`), the vocabulary head at predicted positions alone. A frozen matrix has no weight
gradient, and below the lowest trained layer there is no gradient at all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax

from chai_jax.data.batches import Encoded
from chai_jax.model.params import Declared, declare
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.spec import LayerSpec, Spec


@dataclass(frozen=True)
class Flops:
    """FLOPs of one pass for each token, each pair of tokens of a sequence, and each target.

    Attributes:
        near: of layers whose tokens read the tokens of a window only, (window, FLOPs of a pair) each; no part of
            `pair`.
    """

    token: int = 0
    pair: int = 0
    target: int = 0
    near: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.token + other.token, self.pair + other.pair, self.target + other.target, self.near + other.near
        )

    def of(self, examples: Sequence[Encoded]) -> int:
        """FLOPs of an update with these examples."""
        inputs = [len(example.tokens) - 1 for example in examples]
        pairs = self.attention(lambda window: sum(n * min(n, window or n) for n in inputs))
        return self.token * sum(inputs) + pairs + self.target * sum(len(each.tokens) - each.start for each in examples)

    def attention(self, count: Callable[[int], Any]) -> Any:
        """FLOPs of all pairs of tokens, of which there are `count(window)` in a layer; window 0: none."""
        return self.pair * count(0) + sum(pair * count(window) for window, pair in self.near)


def count_flops(config: Architecture, spec: Spec, trainable: Any = None) -> Flops:
    """An update that trains the leaves marked in `trainable`, a tree like the parameters; None: a forward pass."""
    declared = declare(config, spec)
    marks = trainable or jax.tree.map(lambda _: False, declared, is_leaf=_is_declared)
    flows = any(jax.tree.leaves(marks["embed"]))  # whether the gradient flows down to here

    def matrices(*path: str) -> int:
        nonlocal flows
        part, marked = (reduce(lambda tree, name: tree.get(name, {}), path, tree) for tree in (declared, marks))
        trained = jax.tree.leaves(marked)
        flows = flows or any(trained)
        kernels = zip(jax.tree.leaves(part, is_leaf=_is_declared), trained, strict=True)
        used = ((math.prod(what.shape), trains) for what, trains in kernels if what.kind == "kernel")
        return sum(weights * (2 + 2 * flows + 2 * trains) for weights, trains in used)

    total = Flops(matrices("project_in"))
    for index, layer in enumerate(spec.layers):
        total += Flops(matrices("layers", str(index))) + _pairs(layer, 1 + 2 * flows)
    target = matrices("final_norm") + matrices("project_out")
    table = marks["embed"]["tokens"] if config.tied else marks["head"]["kernel"]
    head = config.vocab_size * config.embed_dim * (2 + 2 * (flows or table) + 2 * table)
    return total + Flops(target=target + head)


def _pairs(layer: LayerSpec, passes: int) -> Flops:
    """Of a layer's attention, in so many passes."""
    each = 2 * passes * (layer.query_heads * layer.key_rank + layer.output_heads * layer.value_rank)
    return Flops(near=((layer.window, each),)) if layer.window else Flops(pair=each)


def spared(config: Architecture, spec: Spec) -> Flops:
    """What a forward pass need not do in the last layer for a token whose hidden state is not wanted: all but its key
    and value, and its pairs with the tokens before it. (Ours makes its query all the same.)"""
    index, layer = len(spec.layers) - 1, spec.layers[-1]
    parts = declare(config, spec)["layers"][str(index)]
    rest = [part for name, part in parts.items() if name not in ("key", "value")]
    kernels = (leaf for leaf in jax.tree.leaves(rest, is_leaf=_is_declared) if leaf.kind == "kernel")
    return Flops(2 * sum(math.prod(kernel.shape) for kernel in kernels)) + _pairs(layer, 1)


def _is_declared(value: Any) -> bool:
    return isinstance(value, Declared)
