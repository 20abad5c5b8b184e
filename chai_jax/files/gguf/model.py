"""A GGUF file as a model: its configuration, its tensors by Hugging Face's names, its tokenizer."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.families.registry import FAMILIES
from chai_jax.files.gguf.fields import KINDS, ROPE_FREQS, config_fields, generation_fields
from chai_jax.files.gguf.header import read_header
from chai_jax.files.gguf.tensors import open_tensors
from chai_jax.files.gguf.words import make_tokenizer
from chai_jax.files.stored import Stored
from chai_jax.files.tokenizer import fitted
from chai_jax.inputs.reading import Record, shown
from chai_jax.model.generation import Generation
from chai_jax.plans.architecture import Architecture

SUFFIX = ".gguf"
# A module by llama.cpp's name, and in our tree.
MODULES = {
    "token_embd": "embed.tokens",
    "position_embd": "embed.positions",
    "output_norm": "final_norm",
    "output": "head",
    "blk.{}.attn_norm": "layers.{}.attention_norm",
    "blk.{}.attn_q": "layers.{}.query",
    "blk.{}.attn_k": "layers.{}.key",
    "blk.{}.attn_v": "layers.{}.value",
    "blk.{}.attn_qkv": "layers.{}.query",  # and key and value
    "blk.{}.attn_q_norm": "layers.{}.query_norm",
    "blk.{}.attn_k_norm": "layers.{}.key_norm",
    "blk.{}.attn_output": "layers.{}.output",
    "blk.{}.ffn_norm": "layers.{}.mlp_norm",
    "blk.{}.ffn_gate": "layers.{}.gate",
    "blk.{}.ffn_up": "layers.{}.up",
    "blk.{}.ffn_down": "layers.{}.down",
}


def is_gguf(path: Path) -> bool:
    """Whether a path is taken for a GGUF file: by its name."""
    return path.suffix == SUFFIX and path.is_file()


class Gguf:
    """A GGUF file, of which only metadata is read until weights are asked for.

    Attributes:
        where: what messages call the file.
        fields: of the config.json that the model would have.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            InputError: the package gguf is missing; the file is none, is cut short or at odds with itself, or holds
                what is not handled.
        """
        self.where = str(path)
        self._header = read_header(path)
        self._tensors = open_tensors(self._header)
        self.fields: Record = config_fields(self._header, self._tensors)

    def weights(self) -> dict[str, Stored]:
        """All tensors by Hugging Face's names and in its order; one with a name that means nothing here keeps it.

        Raises:
            InputError: two tensors have one place.
        """
        kind, family = KINDS[self.fields["model_type"]], FAMILIES[self.fields["model_type"]]
        heads = {"layers.{}.query": "num_attention_heads", "layers.{}.key": "num_key_value_heads"}
        tensors: dict[str, Stored] = {}
        for name, stored in self._tensors.items():
            if name == ROPE_FREQS and kind.rotary:  # which the configuration says
                continue
            number, pattern, last = _parsed(name)
            ours = MODULES.get(pattern, "")
            if ours in family.tensors:
                name = family.full_name(f"{family.tensors[ours].format(number)}.{last}")
            if kind.turned and ours in heads:
                stored = _in_pairs(stored, self.fields[heads[ours]])
            # llama.cpp has every map as torch's Linear, [out, in].
            if family.turned and number and len(stored.shape) == 2:
                stored = _turned(stored)
            if name in tensors:
                raise InputError(f"{shown(self.where)} holds {name!r:.100} twice; expected it once: convert it anew")
            tensors[name] = stored
        return tensors

    def generation(self) -> Generation:
        """How texts are made; raises InputError where a token's id is none."""
        return Generation.checked(generation_fields(self._header.metadata), shown(self.where))

    def tokenizer(self, config: Architecture) -> Any:
        """The tokenizer that the metadata describes, or None; raises InputError where it cannot be made."""
        tokenizer = make_tokenizer(self._header)
        return None if tokenizer is None else fitted(tokenizer, config)


def _parsed(name: str) -> tuple[str, str, str]:
    """Of a tensor's name: the layer's number, or ""; the module, with {} for the number; `weight` or `bias`."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return "", "", ""
    return found[1] or "", found[2] if found[1] is None else f"blk.{{}}.{found[2]}", found[3]


def _in_pairs(stored: Stored, heads: int) -> Stored:
    """The rows of a rotary map as Hugging Face has them, head by head: llama.cpp has the two numbers of a frequency
    beside one another, Hugging Face half a head apart."""

    def read() -> np.ndarray:
        x = stored.read()
        return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return replace(stored, read=read)


def _turned(stored: Stored) -> Stored:
    return replace(stored, shape=stored.shape[::-1], read=lambda: stored.read().T)


def licence_fields(path: Path) -> dict[str, str]:
    """What a file says of the model's licence, by the names of a model card; {} if it cannot be read."""
    try:
        metadata = read_header(path).metadata
    except InputError:
        return {}
    names = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
    found = {theirs: metadata.get(f"general.{ours}") for ours, theirs in names.items()}
    return {name: value for name, value in found.items() if isinstance(value, str)}
