"""Writing an ordinary OPT as a Hugging Face folder, which torch's OPTForCausalLM reads with equal logits."""

from pathlib import Path
from typing import Any

from chai_jax.errors import InputError
from chai_jax.files.atomic import claim_folder, new_folder, write_json
from chai_jax.files.card import write_card
from chai_jax.files.convert import to_hf
from chai_jax.files.hf_config import config_fields
from chai_jax.files.weights import MAX_SHARD_BYTES, write_weights
from chai_jax.model.model import Model

MODEL_TYPE = "opt"


def export(model: Model, out: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a dense model as the Hugging Face folder `out`: configuration, safetensors, tokenizer, model card.

    Quantized weights are written as the float32 numbers they stand for; all others keep their dtype. Cache formats are
    no part of such a folder: `Model.save` keeps them.

    Args:
        out: a new or empty folder.
        max_shard_bytes: weights of more bytes are split into shards with an index.

    Raises:
        InputError: the model is clustered (make it dense with `chai_jax.expand` first); `out` is taken or not writable.
    """
    if not model.spec.is_dense:
        raise InputError("the model is clustered, which no ordinary OPT is; expected a dense one: expand it first")
    with new_folder(claim_folder(Path(out))) as folder:
        write(folder, model, max_shard_bytes)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(folder))
        write_card(folder, model, exported=True)


def write(folder: Path, model: Model, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json, generation_config.json and the weights."""
    tensors = to_hf(model.config, model.params)
    dtypes = {stored.dtype for stored in tensors.values()}
    fields: dict[str, Any] = {
        "architectures": ["OPTForCausalLM"],
        "model_type": MODEL_TYPE,
        # transformers casts all weights to one dtype; float32 holds every other.
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
        **config_fields(model.config),
    }
    write_json(folder / "config.json", fields)
    tokens = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    write_weights(folder, tensors, {"format": "pt"}, max_shard_bytes)
