"""KIVI's and TurboQuant's settings, in code of ours: what attention would read is computed, nothing is packed.

Neither is the authors' program. All rows of a window are read at once, each of them every column either in full or as
read back from few bits, by whichever a cache would hold when that row's token comes. Sizes are the formula's: numbers
of so many bits and their scales in bfloat16, and what stays in bfloat16.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from chai_jax.model.few_bits import NORMAL
from lab.options import Record

GROUP = 32  # numbers that share a scale and a minimum, KIVI's
Pair = tuple[Any, Any]  # of torch tensors: keys and values [B, heads, T, D], or what rows read in full [T, T]


@dataclass(frozen=True)
class Other:
    """A setting: what becomes of keys and values, which rows read which columns in full, and its bytes.

    Attributes:
        stored: from keys and values to what is read back of them.
        fresh: from T to bool [T, T] twice, for keys and for values: row t reads column s in full.
        bits: of a number with its scales, of keys and of values, where heads have so many dimensions.
        kept: numbers that are in bfloat16 after T tokens, of each channel: of keys and of values.
    """

    name: str
    stored: Callable[[Any, Any], Pair]
    fresh: Callable[[int], Pair]
    bits: Callable[[int], tuple[float, float]]
    kept: Callable[[int], tuple[int, int]]

    def sizes(self, head_dim: int, window: int) -> Record:
        """Bytes of a token and of a window as fractions of bfloat16's."""
        bits = self.bits(head_dim)
        whole = [(window - kept) * each + 16 * kept for each, kept in zip(bits, self.kept(window), strict=True)]
        return {"token": sum(bits) / 32, "sequence": sum(whole) / (32 * window)}


def settings() -> Iterator[Other]:
    for bits, residual in ((4, 128), (4, 32), (2, 128), (2, 32)):
        yield kivi(bits, residual)
    for width in (4, 3.5, 3, 2.5):
        yield turboquant(width)
    yield turboquant(4, sinks=4)
    yield turboquant(3, sinks=4)


def kivi(bits: int, residual: int) -> Other:
    """Liu et al. 2024, arXiv 2402.02750, and its published program's decoding: keys wait for `residual` of them, and
    are quantized together, each channel over 32 tokens; of values the `residual` most recent are whole, and each older
    one is quantized by itself, over 32 channels."""
    import torch

    def stored(keys: Any, values: Any) -> Pair:
        whole = keys.shape[-2] // GROUP * GROUP  # of a part of a group nothing is ever read back
        old = even(keys[:, :, :whole].unflatten(-2, (-1, GROUP)), bits, -2).flatten(-3, -2)
        values = even(values.unflatten(-1, (-1, GROUP)), bits, -1).flatten(-2)
        return torch.cat([old, keys[:, :, whole:]], dim=-2), values

    def fresh(length: int) -> Pair:
        row, column = torch.arange(length)[:, None], torch.arange(length)
        return column >= row // residual * residual, column >= row - residual

    return Other(
        f"KIVI's settings, {bits} bits, residual {residual}",
        stored,
        fresh,
        bits=lambda _: (bits + 32 / GROUP, bits + 32 / GROUP),
        kept=lambda length: (length % residual, min(length, residual)),
    )


def turboquant(bits: float, sinks: int = 0) -> Other:
    """Zandieh et al. 2025, arXiv 2504.19874, the variant of least squared error: each token of each head is divided by
    its norm, rotated at random and rounded to the levels that suit a normal distribution; nothing stays whole. Half a
    bit means two such quantizers, the channels of most energy having a bit more, each with a norm of its own: those
    channels are chosen from the window itself, which flatters it. `sinks` first tokens kept whole are our addition."""
    import torch

    high, low = int(np.ceil(bits)), int(np.floor(bits))

    def side(x: Any) -> Any:
        if high == low:
            return gaussian(x, low)
        loud = (x**2).mean(dim=(0, 2)).argsort(dim=-1, descending=True)  # [heads, D]
        order = loud[None, :, None].expand_as(x)
        first, second = x.gather(-1, order).chunk(2, dim=-1)
        both = torch.cat([gaussian(first, high), gaussian(second, low)], dim=-1)
        return torch.empty_like(x).scatter_(-1, order, both)

    def fresh(length: int) -> Pair:
        first = (torch.arange(length) < sinks).expand(length, length)
        return first, first

    each = 16 if high == low else 32  # bits of norms
    return Other(
        f"TurboQuant's settings, {bits:g} bits" + (f", {sinks} first tokens whole" if sinks else ""),
        lambda keys, values: (side(keys), side(values)),
        fresh,
        bits=lambda head_dim: (bits + each / head_dim, bits + each / head_dim),
        kept=lambda length: (sinks, sinks),
    )


def even(x: Any, bits: int, axis: int) -> Any:
    """x as read back from evenly spaced levels between the least and the largest along an axis, both ends and steps in
    bfloat16."""
    import torch

    low = x.amin(axis, keepdim=True).to(torch.bfloat16).float()
    step = ((x.amax(axis, keepdim=True) - low) / (2**bits - 1)).to(torch.bfloat16).float()
    return torch.round((x - low) / step.clamp_min(1e-12)).clamp(0, 2**bits - 1) * step + low


def gaussian(x: Any, bits: int) -> Any:
    """x [..., D] as read back: a bfloat16 norm, and a unit vector that was rotated and rounded to levels of a normal
    distribution."""
    import torch

    size = x.shape[-1]
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn((size, size), generator=random))[0]
    levels = torch.tensor([*(-level for level in reversed(NORMAL[bits])), *NORMAL[bits]])
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit = x / norm @ turn * size**0.5
    nearest = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)] / size**0.5
    return nearest @ turn.T * norm.to(torch.bfloat16).float()


def reader(model: Any, other: Other) -> Callable[[np.ndarray], np.ndarray]:
    """Logits [B, T, V] of whole windows int [B, T] without padding, read with such a cache."""
    import torch
    from transformers import AttentionInterface

    def attention(module: Any, query: Any, key: Any, value: Any, _: Any, scaling: float, **__: Any) -> Pair:
        times, length = query.shape[1] // key.shape[1], query.shape[2]
        fresh_keys, fresh_values = other.fresh(length)
        old = [each.repeat_interleave(times, dim=1) for each in other.stored(key, value)]
        key, value = (each.repeat_interleave(times, dim=1) for each in (key, value))
        scores = torch.where(fresh_keys, query @ key.mT, query @ old[0].mT) * scaling
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        out = (weights * fresh_values) @ value + (weights * ~fresh_values) @ old[1]
        return out.transpose(1, 2).contiguous(), weights

    def read(tokens: np.ndarray) -> np.ndarray:
        AttentionInterface.register("other", attention)
        before = model.config._attn_implementation
        model.set_attn_implementation("other")
        try:
            with torch.no_grad():
                logits: np.ndarray = model(torch.as_tensor(tokens).long(), use_cache=False).logits.numpy()
        finally:
            model.set_attn_implementation(before)
        return logits

    return read
