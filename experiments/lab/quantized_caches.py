"""transformers' `QuantizedCache`, read as it decodes.

Its layers keep new tokens in full precision until there are `residual_length` (128) of them, then quantize all. So a
token reads the earlier ones back from few bits, up to 127 of the most recent in full, and itself. A prompt is read in
full: its tokens are quantized afterwards, all of them at once. A window is fed as a prompt of `PROMPT` tokens (as many
as our formats keep in bfloat16, so that these cost neither of us anything), then the rest as if token by token: a chunk
that ends where the layers quantize reads just what its tokens would have read one after the other. (`fp8` has no
residual: every token behind the prompt reads the cache as stored.)
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from lab.options import Record

PROMPT = 64
RESIDUAL = 128  # the class's default


@dataclass(frozen=True)
class Setting:
    """One cache: its name, and the arguments of `QuantizedCache`."""

    name: str
    arguments: Record

    def cache(self, config: Any) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(config=config, **self.arguments)


def settings() -> Iterator[Setting]:
    """Each backend at 4 and 2 bits. quanto's default axis (0) gives each token of a head its own scale, over the 64
    neighbours that are the default; axis -1 shares it between 64 tokens of a channel, as KIVI does. HQQ's documentation
    asks for axis 1, which is by token too; its default, 0, mixes heads and distant tokens in a group."""
    for bits in (4, 2):
        yield Setting(f"transformers, quanto {bits} bits", {"backend": "quanto", "nbits": bits})
        by_channel = {"backend": "quanto", "nbits": bits, "axis_key": -1}
        yield Setting(f"transformers, quanto {bits} bits, keys by channel", by_channel)
        yield Setting(
            f"transformers, HQQ {bits} bits", {"backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1}
        )
    yield Setting("transformers, HQQ 4 bits, axis 0", {"backend": "hqq", "nbits": 4})
    yield Setting("transformers, fp8", {"backend": "fp8"})


def chunks(length: int) -> list[slice]:
    """What is fed at once: the prompt, then up to each time that the layers quantize."""
    edges = [0, *range(PROMPT, length, RESIDUAL), length]
    return [slice(*pair) for pair in pairwise(edges) if pair[0] < pair[1]]


def reader(model: Any, setting: Setting) -> Callable[[np.ndarray], np.ndarray]:
    """Logits [1, T, V] of one window int [1, T], each token reading the past from such a cache."""
    import torch

    # The argument's name changed within transformers 5.
    name = "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"

    def read(tokens: np.ndarray) -> np.ndarray:
        held = {name: setting.cache(model.config)}
        with torch.no_grad():
            parts = [model(torch.as_tensor(tokens[:, part]).long(), **held).logits for part in chunks(tokens.shape[1])]
        return torch.cat(parts, dim=1).numpy()

    return read


def sizes(config: Any, setting: Setting, window: int) -> Record:
    """Bytes of a token and of a whole window as fractions of bfloat16's, summed from the tensors of a bfloat16 model.

    A token is what a further `RESIDUAL` of them add, divided by their number.
    """
    held = partial(held_bytes, config, setting)
    whole = 2 * 2 * config.num_key_value_heads * config.head_dim  # of a token and layer in bfloat16
    token = (held(PROMPT + 3 * RESIDUAL) - held(PROMPT + RESIDUAL)) / (2 * RESIDUAL)
    return {"token": token / whole, "sequence": held(window) / (window * whole)}


def held_bytes(config: Any, setting: Setting, length: int) -> int:
    """Of one layer, after so many tokens."""
    import torch

    layer = setting.cache(config).layers[0]
    for part in chunks(length):
        shape = (1, config.num_key_value_heads, part.stop - part.start, config.head_dim)
        layer.update(*(torch.randn(shape).to(torch.bfloat16) for _ in "kv"))
    return sum(map(tensor_bytes, (layer._quantized_keys, layer._quantized_values, residual(layer))))


def residual(layer: Any) -> Any:
    """What a layer holds in full; layers without a residual only keep their first tensors' type there."""
    return [x for x in (layer.keys, layer.values) if x.numel() and x.dim() == 4] if hasattr(layer, "nbits") else []


def tensor_bytes(value: Any) -> int:
    """Of all tensors in a nest of tuples, dicts and quanto's tensors."""
    import torch

    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    if not isinstance(value, torch.Tensor):
        return 0
    parts = [getattr(value, name) for name in ("_data", "_scale", "_shift") if hasattr(value, name)]
    return sum(map(tensor_bytes, parts)) if parts else value.numel() * value.element_size()
