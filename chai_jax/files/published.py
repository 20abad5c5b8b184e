"""The shapes of published models, known without their files."""

from typing import Any

from chai_jax.errors import InputError
from chai_jax.files.families.opt import parse_config
from chai_jax.inputs.paths import user_path
from chai_jax.inputs.reading import read_json
from chai_jax.plans.architecture import Architecture


def _opt(layers: int, heads: int, width: int, ffn: int, **rest: Any) -> Architecture:
    return Architecture(50272, width, layers, heads, ffn, 2048, **{"embed_dim": width, **rest})


# Zhang et al. 2022 (arXiv 2205.01068), table 1, and the checkpoints' config.json.
KNOWN = {
    "facebook/opt-125m": _opt(12, 12, 768, 3072),
    "facebook/opt-350m": _opt(24, 16, 1024, 4096, embed_dim=512, pre_norm=False),
    "facebook/opt-1.3b": _opt(24, 32, 2048, 8192),
    "facebook/opt-2.7b": _opt(32, 32, 2560, 10240),
    "facebook/opt-6.7b": _opt(32, 32, 4096, 16384),
    "facebook/opt-13b": _opt(40, 40, 5120, 20480),
}


def architecture_of(model: str) -> Architecture:
    """The shape of a model: one of facebook/opt-{125m, 350m, 1.3b, 2.7b, 6.7b, 13b}, or a folder with a config.json.

    Raises:
        InputError: it is neither.
    """
    if model in KNOWN:
        return KNOWN[model]
    path = user_path(model) / "config.json"
    if not path.is_file():
        raise InputError(f"{model} is no folder with a config.json; expected one, or one of {', '.join(KNOWN)}")
    return parse_config(read_json(path), str(path))
