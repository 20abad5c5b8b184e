"""README.md of the folders we write: what the model is, how to load it, and under whose licence it stands."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax

from chai_jax.files.families.family import Licence
from chai_jax.files.families.registry import FAMILIES, family_of
from chai_jax.files.gguf.model import is_gguf, licence_fields
from chai_jax.files.hub import cached
from chai_jax.inputs.reading import SMALL, read_text
from chai_jax.model.cache import bytes_per_token
from chai_jax.model.model import Model
from chai_jax.model.quantized import is_leaf
from chai_jax.plans.spec import LayerSpec, Spec

UNKNOWN = {"license": "unknown"}
LICENCE_FIELDS = ("license", "license_name", "license_link")  # of a card's front matter
USE = """```python
import chai_jax as chai

model = chai.load("this folder")
```"""


@dataclass(frozen=True)
class Origin:
    """What a model was made from: a hub id ("" if unknown), the licence fields of its card, its licence's texts."""

    base_model: str
    licence: dict[str, str]
    files: tuple[Path, ...]


def origin(source: str) -> Origin:
    """What is known here, without network, of the model at `source` (a folder, a GGUF file or a hub id)."""
    path = Path(source).expanduser()
    if is_gguf(path):
        return Origin("", licence_fields(path) or UNKNOWN, ())
    folder = path if source and path.is_dir() else cached(source) if source.count("/") == 1 else None
    front = front_matter(folder / "README.md") if folder else {}
    base = front.get("base_model") or ("" if folder == path else source)
    licence = {name: value for name, value in front.items() if name in LICENCE_FIELDS}
    known = licence_of(base)
    if known is not None and set(licence) <= {"license"}:
        licence = dict(known.fields)
    files = sorted(folder.glob("LICENSE*")) if folder else []
    texts = tuple(file for file in files if file.is_file() and file.stat().st_size <= SMALL)
    return Origin(base, licence or UNKNOWN, texts)


def licence_of(base_model: str) -> Licence | None:
    """The licence of a published model, by its hub id, where its family has one."""
    licences = (family.licence for family in FAMILIES.values())
    return next((licence for licence in licences if licence and base_model.startswith(licence.hub_ids)), None)


def front_matter(card: Path) -> dict[str, str]:
    """The plain `name: text` fields of a model card's front matter; anything nested is left out."""
    try:
        lines = read_text(card).splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return {}
    pairs = (re.fullmatch(r"(\w+):\s+(\S.*)", line) for line in lines[1 : lines.index("---", 1)])
    return {pair[1]: pair[2].rstrip().strip("\"'") for pair in pairs if pair}


def write_card(folder: Path, model: Model, *, exported: bool) -> None:
    """Write README.md, and copy the licence files of the model that `model` was made from.

    Args:
        exported: whether the folder holds an ordinary model, which transformers reads too.
    """
    known, family = origin(model.source), family_of(model.config)
    for file in known.files:
        shutil.copyfile(file, folder / file.name)
    fields = {
        "library_name": "transformers" if exported else "chai_jax",
        "pipeline_tag": "text-generation",
        **({"base_model": known.base_model} if known.base_model else {}),
        **known.licence,
    }
    # A JSON string is a YAML string.
    front = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
    name = (known.base_model or model.source).rstrip("/").rpartition("/")[2] or family.name
    parts = [
        f"---\n{front}\ntags:\n- {family.model_type}\n---",
        f"# {name}, by chai_jax",
        (_ordinary if exported else _compressed)(model, family.name),
        f"## Licence\n\n{_terms(known)}\n",
    ]
    (folder / "README.md").write_text("\n\n".join(parts), encoding="utf-8")


def _size(model: Model) -> str:
    config = model.config
    grouped = f" ({config.kv_heads} key/value heads)" if config.queries > 1 else ""
    return f"{config.num_layers} layers of {config.num_heads} heads{grouped}, width {config.hidden_size}"


def _ordinary(model: Model, name: str) -> str:
    leaves = jax.tree.leaves(model.params, is_leaf=is_leaf)
    rounded = sum(map(is_leaf, leaves))
    note = f" {rounded} quantized tensors are written as the float32 numbers they stand for." if rounded else ""
    return f"An ordinary {name} ({_size(model)}), for transformers and for chai_jax.{note}\n\n{USE}"


def _compressed(model: Model, name: str) -> str:
    config = model.config
    dense = bytes_per_token(Spec.of(config, "bfloat16"))
    export = (
        "`chai-jax export` makes a folder that it can"
        if all(layer.membership == "calibrated" for layer in model.spec.layers)
        else f"nor can any export be, for no ordinary {name} finds its clusters anew for every prompt"
    )
    rows = "\n".join(_row(index, layer, config.queries) for index, layer in enumerate(model.spec.layers))
    return (
        f"A compressed {name} ({_size(model)}). Its weights take {model.nbytes:,} bytes, its K,V cache "
        f"{model.kv_bytes_per_token:,} bytes per token ({dense:,} for the same model dense in bfloat16). transformers "
        f"cannot read it; {export}.\n\n{USE}\n\n"
        "| layer | share | cached K heads | cached V heads | cache | weights |\n| --- | --- | --- | --- | --- | --- |\n"
        + rows
    )


def _row(index: int, layer: LayerSpec, queries: int) -> str:
    storage = ", ".join(sorted(set(layer.storages)))
    share = f"{layer.share}, per prompt" if layer.membership == "prompt" else layer.share
    share += f", {layer.queries} of {queries} queries a key head" if layer.queries < queries else ""
    return f"| {index} | {share} | {layer.key_heads} | {layer.value_heads} | {storage} | {layer.weights} |"


def _terms(known: Origin) -> str:
    stated = ", ".join(f"{name}: {value}" for name, value in known.licence.items())
    of = f" of {known.base_model}" if known.base_model else " of the model it was made from"
    files = f" Its text is in {', '.join(file.name for file in known.files)}." if known.files else ""
    licence = licence_of(known.base_model)
    notice = f"\n\n{licence.notice}" if licence else ""
    return f"The licence{of} applies ({stated}).{files}{notice}"
