"""The metadata of a GGUF file as the fields of a config.json, which the family's reader then checks as any other's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chai_jax.errors import InputError
from chai_jax.files.families.config import ABSENT
from chai_jax.files.gguf.header import Header
from chai_jax.files.stored import Stored
from chai_jax.inputs.fields import brief
from chai_jax.inputs.reading import Record, shown
from chai_jax.model.rotary import turns
from chai_jax.plans.architecture import Rotary


@dataclass(frozen=True)
class Kind:
    """An architecture of llama.cpp's that can be read; its name is transformers' `model_type`.

    Attributes:
        names: the field of config.json of each of its sizes.
        rotary: whether it has rotary positions.
        turned: whether llama.cpp keeps the rows of queries and keys in another order.
        head_size: whether its heads may be of another size than width / heads.
        biases: fields that say whether there are biases, and a module of the first layer that then has one.
    """

    names: Mapping[str, str]
    rotary: bool = True
    turned: bool = False
    head_size: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)


LLAMA_LIKE = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q"}
KINDS = {
    "llama": Kind(LLAMA_LIKE, turned=True, head_size=True, biases={**ATTENTION_BIAS, "mlp_bias": "blk.0.ffn_up"}),
    "qwen2": Kind(LLAMA_LIKE),
    "qwen3": Kind(LLAMA_LIKE, head_size=True, biases=ATTENTION_BIAS),
    "gpt2": Kind(GPT2, rotary=False),
}
# What decides nothing: the vocabulary's size is that of the embedding.
IGNORED = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, a turn, a message: generation stops at all
ROPE_FREQS = "rope_freqs.weight"
# Llama 3's scaling but for the factor: the same in every model of it, and in no metadata.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


class Given:
    """The metadata of an architecture, asked for by name; what nobody asked for is refused in the end."""

    def __init__(self, header: Header, kind: str) -> None:
        self.where, self.prefix = shown(header.path), f"{kind}."
        self.left = {
            key.removeprefix(self.prefix): value
            for key, value in header.metadata.items()
            if key.startswith(self.prefix)
        }

    def get(self, name: str) -> Any:
        """A value, or None. Of an array with an entry for each layer the one that all have."""
        value = self.left.pop(name, None)
        if not isinstance(value, (list, np.ndarray)):
            return value
        entries = np.asarray(value).tolist()
        if not entries or any(entry != entries[0] for entry in entries):
            raise self.refused(name, value, "the same in every layer")
        return entries[0]

    def needed(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise InputError(f"{self.where} has no {self.prefix}{name} in its metadata; expected it: convert it anew")
        return value

    def refused(self, name: str, value: Any, expected: str) -> InputError:
        return InputError(
            f"{self.where} has {self.prefix}{name} {brief(value):.80}, which is not handled; expected {expected}: "
            "choose another model"
        )

    def check_rest(self) -> None:
        """Refuse what is left, which might change what the model computes, unless it says that there is no such thing.

        Raises:
            InputError: naming it.
        """
        if self.get("attention.causal") not in (None, True):
            raise self.refused("attention.causal", False, "true")
        for name, value in self.left.items():
            if name not in IGNORED and not (np.ndim(value) == 0 and value in ABSENT):
                raise self.refused(name, value, "none")


def config_fields(header: Header, tensors: Mapping[str, Stored]) -> Record:
    """The fields of the config.json that the model would have.

    Args:
        tensors: by llama.cpp's names; only shapes are looked at, and the numbers of `ROPE_FREQS`.

    Raises:
        InputError: an architecture that is unknown; metadata that is missing or not handled.
    """
    name, what = (header.metadata.get(f"general.{key}") for key in ("architecture", "type"))
    if what not in (None, "model"):
        raise InputError(f"{shown(header.path)} holds {brief(what)} in general.type; expected a model: choose one")
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(
            f"{shown(header.path)} holds a model of architecture {brief(name)}; expected one of {', '.join(KINDS)}: "
            "choose such a model, or its folder in Hugging Face's layout"
        )
    kind, given = KINDS[name], Given(header, name)
    embedding = tensors.get("token_embd.weight")
    fields: Record = {
        "model_type": name,
        **{theirs: given.needed(ours) for ours, theirs in kind.names.items()},
        "vocab_size": embedding.shape[0] if embedding else None,
        "tie_word_embeddings": "output.weight" not in tensors,
        **token_ids(header.metadata),
        **{theirs: f"{module}.bias" in tensors for theirs, module in kind.biases.items()},
    }
    kv_heads = given.get("attention.head_count_kv")
    if kind.rotary:
        fields["num_key_value_heads"] = fields["num_attention_heads"] if kv_heads is None else kv_heads
    elif kv_heads not in (None, fields[kind.names["attention.head_count"]]):
        raise given.refused("attention.head_count_kv", kv_heads, "as many as heads")
    size = _head_size(given, kind, fields)
    if kind.rotary:
        fields |= _rotary(given, size, fields["max_position_embeddings"], tensors.get(ROPE_FREQS))
    if kind.head_size:
        fields["head_dim"] = size
    given.check_rest()
    return fields


def token_ids(metadata: Mapping[str, Any]) -> Record:
    """The special tokens by their names in config.json; of a SentencePiece vocabulary those of Llama, unless others are
    named."""
    usual = {"bos_token_id": 1, "eos_token_id": 2} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    return {theirs: metadata.get(f"tokenizer.ggml.{ours}", usual.get(theirs)) for theirs, ours in TOKENS.items()}


def generation_fields(metadata: Mapping[str, Any]) -> Record:
    """The fields of the generation_config.json that the model would have."""
    ids = token_ids(metadata)
    found = [metadata.get(f"tokenizer.ggml.{name}", ids.get(name)) for name in ENDS]
    ends = list(dict.fromkeys(end for end in found if end is not None))
    fields = {**ids, "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}
    return {name: value for name, value in fields.items() if value is not None}


def _head_size(given: Given, kind: Kind, fields: Record) -> Any:
    """Dimensions of a head: of keys and values alike, and all of them turned."""
    width, heads = (fields[kind.names[name]] for name in ("embedding_length", "attention.head_count"))
    whole = type(width) is int and type(heads) is int and heads > 0
    usual, size = width // heads if whole else None, given.get("attention.key_length")
    size = usual if size is None else size
    if whole and not kind.head_size and size != usual:
        raise given.refused("attention.key_length", size, f"{usual}, width / heads")
    for name in ("attention.value_length", *(["rope.dimension_count"] if kind.rotary else [])):
        value = given.get(name)
        if whole and value not in (None, size):  # else the family's reader refuses width or heads
            raise given.refused(name, value, f"{size}, the size of a head")
    return size


def _rotary(given: Given, size: Any, context: Any, freqs: Stored | None) -> Record:
    """Rotary positions; without a type, a factor other than 1 is that of `linear`, as in llama.cpp."""
    theta, factor = given.get("rope.freq_base"), given.get("rope.scaling.factor")
    theta, factor = 10_000.0 if theta is None else theta, factor or given.get("rope.scale_linear") or 1.0
    kind, trained = given.get("rope.scaling.type"), given.get("rope.scaling.original_context_length")
    betas = {name: given.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    if kind is None:
        kind = "none" if factor == 1 else "linear"
    if freqs is not None and kind != "none":
        raise given.refused("rope.scaling.type", kind, f"none beside {ROPE_FREQS}")
    if kind == "none":
        return {"rope_theta": theta, **({} if freqs is None else _llama3(given.where, freqs, theta, size))}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        raise given.refused("rope.scaling.type", kind, "none, linear or yarn")
    scaling = {"factor": factor, "original_max_position_embeddings": trained or context, **betas}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "yarn", **scaling}}


def _llama3(where: str, freqs: Stored, theta: Any, size: Any) -> Record:
    """Llama 3's scaling from the factors that llama.cpp divides the frequencies by.

    Raises:
        InputError: they are not those of Llama 3, whatever its factor.
    """
    fits = type(size) is int and freqs.shape == (size // 2,) and freqs.dtype == "float32"
    factors = freqs.read() if fits else np.zeros(0)
    if fits and np.all(factors == 1):
        return {}
    if fits and isinstance(theta, (int, float)) and 1 < theta < 1e12 and 1 <= factors.max() < 1e6:
        numbers = {"factor": float(factors.max()), **LLAMA3}
        plain = turns(Rotary(float(theta)), size)[0]
        slowed = turns(Rotary(float(theta), 1.0, "llama3", tuple(sorted(numbers.items()))), size)[0]
        if np.allclose(plain / slowed, factors, rtol=1e-5, atol=0):
            return {"rope_scaling": {"rope_type": "llama3", **numbers}}
    raise InputError(
        f"{ROPE_FREQS} in {where} scales the rotary positions as no Llama 3 does; expected its factors: choose another "
        "model"
    )
