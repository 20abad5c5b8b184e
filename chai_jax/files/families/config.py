"""Reading a config.json by a family's table of names: every value is checked, and nothing is passed over in silence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from chai_jax.errors import InputError
from chai_jax.files.families.family import SPECIAL_TOKENS
from chai_jax.model.decoder import ACTIVATIONS
from chai_jax.model.generation import NOT_OBEYED, OBEYED
from chai_jax.model.rotary import SCALINGS
from chai_jax.plans.architecture import Architecture, Rotary

ALIASES = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu", "swish": "silu"}
# A mistyped size must not fill the memory: with arrays, or with descriptions of layers and heads.
LARGEST = 1 << 24
LARGEST_OF = {"num_layers": 1 << 12, "num_heads": 1 << 12, "num_kv_heads": 1 << 12}
# What decides nothing of what a decoder computes: training, bookkeeping, how texts are made (see `read_generation`).
TRAINING = {
    *("initializer_range", "pretraining_tp", "gradient_checkpointing", "problem_type", "id2label", "label2id"),
    *(
        "attention_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "classifier_dropout",
        "dropout",
    ),
    *("num_labels", "finetuning_task", "task_specific_params"),
}
BOOKKEEPING = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "auto_map"),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "tokenizer_class"),
    *("prefix", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "transformers.js_config"),
    *("is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder"),
    *("decoder_start_token_id", "sep_token_id", "forced_bos_token_id", "forced_eos_token_id", "max_length"),
    *("quantization_config", "unsloth_version", "unsloth_fixed", "attn_implementation"),
}
COMMON = frozenset(TRAINING | BOOKKEEPING)


@dataclass(frozen=True)
class Table:
    """How a family's config.json is read.

    Attributes:
        name: of the family, for messages.
        names: their field of each of ours.
        defaults: of ours, where the file has none; a field without one must be given. One that is None may be null.
        always: what every model of the family has.
        fixed: fields that are not handled, and the values that they may have.
        ignored: fields that decide nothing; None: all others.
        own: fields that the family's reader takes by itself.
    """

    name: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    always: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] | None = frozenset()
    own: tuple[str, ...] = ()

    def read(self, fields: Mapping[str, Any], where: str, **more: Any) -> Architecture:
        """The architecture that the fields describe; `more` is what the family's reader found by itself.

        Raises:
            InputError: naming the field that is missing, of the wrong type, out of range, at odds with another, or not
                handled.
        """
        self._refuse_unknown(fields, where)
        values = {ours: self._value(theirs, ours, fields, where) for theirs, ours in self.names.items()}
        values |= token_ids(fields, self.defaults, values["vocab_size"], where)
        values["activation"] = ALIASES.get(values["activation"], values["activation"])
        values.setdefault("embed_dim", values["hidden_size"])
        config = Architecture(**{**values, **self.always, **more})
        self._check(config, where)
        return config

    def _value(self, theirs: str, ours: str, fields: Mapping[str, Any], where: str) -> Any:
        value = fields.get(theirs, self.defaults.get(ours))
        if value is None:
            if ours in self.defaults and self.defaults[ours] is None:
                return None
            raise InputError(f"{where} has no {theirs}; expected {self.name}'s sizes: restore the file")
        kind = KINDS[ours]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{where} has {theirs} {value!r:.80}; expected {kind.__name__}: mend the file")
        return value

    def _refuse_unknown(self, fields: Mapping[str, Any], where: str) -> None:
        for name, allowed in self.fixed.items():
            if name in fields and fields[name] not in allowed:
                raise InputError(
                    f"{where} has {name} {fields[name]!r:.80}, which is not handled; expected "
                    f"{' or '.join(map(repr, allowed))}: choose another model"
                )
        if self.ignored is None:
            return
        known = COMMON | self.ignored | self.names.keys() | self.fixed.keys() | {*self.own, *SPECIAL_TOKENS}
        known |= {*OBEYED, *NOT_OBEYED}
        for name, value in fields.items():
            if name not in known and not name.startswith("_") and value not in ABSENT:
                raise InputError(
                    f"{where} has {name} {value!r:.80}, which no {self.name} that is handled here has; expected none: "
                    "remove it if it decides nothing"
                )

    def _check(self, config: Architecture, where: str) -> None:
        for theirs, ours in self.names.items():
            value, most = getattr(config, ours), LARGEST_OF.get(ours, LARGEST)
            if type(value) is int and not 1 <= value <= most:
                raise InputError(f"{where} has {theirs} {value!s:.80}; expected 1 to {most}: mend the file")
        named = {ours: theirs for theirs, ours in self.names.items()}
        heads = f"{config.num_heads} {named['num_heads']}"
        if config.head_size is None and config.hidden_size % config.num_heads:
            name = named["hidden_size"]
            raise InputError(f"{where} has {name} {config.hidden_size}, no multiple of its {heads}: mend the file")
        if config.num_heads % config.kv_heads:
            raise InputError(
                f"{where} has {config.kv_heads} {named['num_kv_heads']}, which do not divide its {heads}: mend the file"
            )
        if config.rotary is not None and (config.head_dim % 2 or int(config.head_dim * config.rotary.fraction) % 2):
            raise InputError(
                f"{where} turns {config.rotary.fraction:g} of {config.head_dim} dimensions of a head; expected an even "
                "number: choose another model"
            )
        if config.activation not in ACTIVATIONS:
            name, known = named["activation"], ", ".join(sorted(ACTIVATIONS.keys() | ALIASES.keys()))
            raise InputError(f"{where} has {name} {config.activation!r:.80}; expected one of {known}")

    def write(self, config: Architecture) -> dict[str, Any]:
        """The inverse of `read`, but for what the family's reader takes by itself; what is absent is left out."""
        described = {theirs: getattr(config, ours) for theirs, ours in self.names.items()}
        described = {name: value for name, value in described.items() if value is not None}
        return described | {name: getattr(config, name) for name in SPECIAL_TOKENS}


ABSENT: tuple[Any, ...] = (None, False, 0, "", [], {})


def _kind(hint: Any) -> type:
    """The type that a config.json has for a field: the first of several."""
    first = get_args(hint)[0] if get_origin(hint) in (Union, UnionType) else hint
    return get_origin(first) or first


KINDS = {name: _kind(hint) for name, hint in get_type_hints(Architecture).items()}


def token_ids(given: Mapping[str, Any], defaults: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """The special tokens, of which there need not be any: null and, as in transformers, ids outside the table are none.

    Padding is masked, so that any token will do for it: where none is given it is the end's, as in transformers.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in SPECIAL_TOKENS:
        value = given.get(name, defaults.get(name))
        many = name == "eos_token_id" and isinstance(value, (list, tuple))
        ids = value if many else () if value is None else (value,)
        if not all(type(token) is int for token in ids):
            kinds = "a token id, a list of them, or null" if name == "eos_token_id" else "a token id or null"
            raise InputError(f"{where} has {name} {value!r:.80}; expected {kinds}: mend the file")
        found[name] = tuple(token for token in ids if 0 <= token < vocab_size)
    bos, eos, pad = (found[name] for name in SPECIAL_TOKENS)
    return {
        "bos_token_id": bos[0] if bos else None,
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": (*pad, *eos, 0)[0],
    }


# The numbers of each scaling: those it must have, and those it may.
SCALING_NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
ROTARY = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings")


def read_rotary(
    fields: Mapping[str, Any],
    where: str,
    theta: float = 10_000.0,
    fraction: float = 1.0,
    names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
) -> Rotary:
    """Rotary positions as a config.json describes them, before transformers 5 (`rope_scaling`) or since.

    Args:
        theta, fraction: where the file says nothing.
        names: of both, outside the scaling.

    Raises:
        InputError: a scaling that is unknown, or lacks a number; a field that is not handled.
    """
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise InputError(f"{where} has rope_scaling {scaling!r:.80}; expected an object or null: mend the file")
    given = {name: value for name, value in scaling.items() if value is not None}
    kinds = [given.pop(name, "default") for name in ("type", "rope_type")]
    kind = kinds[1] if kinds[0] == "default" else kinds[0]
    if "default" not in kinds and kinds[0] != kinds[1]:
        raise InputError(f"{where} has rope_scaling {kinds[0]!r:.80} and {kinds[1]!r:.80}; expected one: mend the file")
    if kind not in SCALINGS:
        raise InputError(f"{where} has rope_scaling {kind!r:.80}; expected one of {', '.join(SCALINGS)}")
    outside = {name: fields[name] for name in names if fields.get(name) is not None}
    theta = given.pop("rope_theta", outside.get(names[0], theta))
    fraction = given.pop("partial_rotary_factor", outside.get(names[1], fraction))
    needed, possible = SCALING_NUMBERS[kind]
    if "original_max_position_embeddings" in needed:
        context = fields.get("original_max_position_embeddings") or fields.get("max_position_embeddings")
        given.setdefault("original_max_position_embeddings", context)
    if kind == "dynamic":  # which takes the context from max_position_embeddings
        given.pop("original_max_position_embeddings", None)
    for name in needed:
        if name not in given:
            raise InputError(f"{where} has rope_scaling {kind} without {name}; expected it: mend the file")
    for name in given.keys() - {*needed, *possible}:
        raise InputError(f"{where} has {name} in rope_scaling {kind}, which is not handled: choose another model")
    numbers = {"theta": theta, "fraction": fraction, **given}
    for name, value in numbers.items():
        least = 0 if name in ("mscale", "mscale_all_dim", "truncate") else 1e-6
        if type(value) not in (int, float, bool) or not least <= value <= 1e12 or (name == "fraction" and value > 1):
            raise InputError(f"{where} has {name} {value!r:.80} in its rotary positions; expected a number: mend it")
    return Rotary(float(theta), float(fraction), kind, tuple(sorted((key, float(given[key])) for key in given)))


def write_rotary(rotary: Rotary, names: tuple[str, str] = ("rope_theta", "partial_rotary_factor")) -> dict[str, Any]:
    """The inverse, as other tools have always read it."""
    fields: dict[str, Any] = {names[0]: rotary.theta}
    if rotary.fraction != 1 or names[1] != "partial_rotary_factor":
        fields[names[1]] = rotary.fraction
    if rotary.scaling != "default":
        whole = {"original_max_position_embeddings": int, "truncate": bool}
        numbers = {name: whole.get(name, float)(value) for name, value in rotary.numbers}
        fields["rope_scaling"] = {"rope_type": rotary.scaling, **numbers}
    return fields
