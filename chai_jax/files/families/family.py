"""What has to be known of a family of models, so that its checkpoints can be read and written."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from chai_jax.inputs.reading import Record
from chai_jax.plans.architecture import Architecture

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of every family's config.json


@dataclass(frozen=True)
class Licence:
    """The licence of a family's published checkpoints.

    Attributes:
        hub_ids: what the hub ids under it begin with.
        fields: what their model cards say of it.
        notice: what must be said with every copy.
    """

    hub_ids: str
    fields: Mapping[str, str]
    notice: str


@dataclass(frozen=True)
class Family:
    """A family of models as data: everything that is particular to it outside the forward pass.

    What its forward pass computes is said by the `Architecture` that `parse_config` gives. Which tensors there are, and
    their shapes, follows from that (`chai_jax.model.params.declare`).

    Attributes:
        model_type: transformers' name of the family, in config.json.
        name: in messages and model cards.
        torch_class: transformers' class that reads an exported folder.
        parse_config: the architecture that the fields of a config.json describe; the second argument is what messages
            call the file. It raises InputError, naming the field, for all that we would not compute as transformers.
        config_fields: the inverse: the fields of config.json that describe an architecture.
        tensors: where a module or leaf of our tree is in a checkpoint, both as dotted names without the last ".weight"
            or ".bias", theirs below the prefix; `{}` is a layer's number.
        prefixes: of tensor names in files; the first is written. The head has none.
        fused: of tensors that hold several modules, how they lie in it: `blocks` (one after the other) or `heads` (in
            turns, head by head).
        turned: whether kernels are stored as [in, out] (transformers' Conv1D), not as torch's [out, in].
        ignored: tensors that mean nothing; `{}` is any number.
        published: the shapes of published models, by hub id.
        licence: of the published models.
    """

    model_type: str
    name: str
    torch_class: str
    parse_config: Callable[[Record, str], Architecture]
    config_fields: Callable[[Architecture], Record]
    tensors: Mapping[str, str]
    prefixes: tuple[str, ...]
    fused: Mapping[str, str] = field(default_factory=dict)
    turned: bool = False
    ignored: tuple[str, ...] = ()
    published: Mapping[str, Architecture] = field(default_factory=dict)
    licence: Licence | None = None

    def tensor_name(self, path: tuple[str, ...]) -> str:
        """The name, below the prefix, of the tensor that holds the leaf at `path` of our tree."""
        *parents, last = path
        module = parents if last in ("kernel", "scale", "bias") else path
        number = module[1] if module[0] == "layers" else ""
        pattern = ".".join(("layers", "{}", *module[2:]) if number else module)
        return f"{self.tensors[pattern].format(number)}.{'bias' if last == 'bias' else 'weight'}"

    def layout(self, name: str) -> str:
        """How modules lie in a tensor: `alone`, `blocks` or `heads`."""
        return self.fused.get(re.sub(r"\.\d+\.", ".{}.", name.rpartition(".")[0]), "alone")

    def means_nothing(self, name: str) -> bool:
        """Whether a tensor is one that other programs left in the file."""
        return re.sub(r"(^|\.)\d+\.", r"\1{}.", name) in self.ignored

    def full_name(self, name: str) -> str:
        """A tensor's name as it is written: with the prefix."""
        return name if name == self.head else self.prefixes[0] + name

    @property
    def head(self) -> str:
        """The name of the vocabulary head's tensor."""
        return self.tensor_name(("head", "kernel"))

    @property
    def embedding(self) -> str:
        """The name of the table of token embeddings, which may be the head too (tied)."""
        return self.tensor_name(("embed", "tokens"))
