"""Model FLOPs against PaLM's closed form and against what XLA counts in the compiled program."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.adapt.finetune import completion_loss
from chai_jax.adapt.step import everything, gradients, split
from chai_jax.adapt.target import layer_mask
from chai_jax.adapt.updates import pack_update
from chai_jax.data.batches import Encoded
from chai_jax.files.published import PUBLISHED
from chai_jax.model.flops import Flops, count_flops
from chai_jax.model.model import Model
from chai_jax.model.params import Declared, Params, declare
from chai_jax.plans.architecture import Architecture, Rotary
from chai_jax.plans.spec import Spec

OPT125M, DENSE = Architecture(50272, 768, 12, 12, 3072, 2048, 768), Spec.dense(12, 12, 64)


def marks(config: Architecture, spec: Spec, value: bool = True) -> Any:
    return jax.tree.map(lambda _: value, declare(config, spec), is_leaf=lambda x: isinstance(x, Declared))


def test_a_dense_model_costs_what_palm_says() -> None:
    """6 N + 12 L H Q T per token; the head, V D weights, at every position. N: 12 L D^2 here."""
    length, found = 512, count_flops(OPT125M, DENSE, marks(OPT125M, DENSE))
    examples = [Encoded((5,) * (length + 1), 1)] * 3
    weights = 12 * 12 * 768**2 + 50272 * 768
    expected = 3 * length * (6 * weights + 12 * 12 * 12 * 64 * length)
    assert found.of(examples) == expected
    assert count_flops(OPT125M, DENSE).of(examples) == expected / 3


def test_gates_grouped_heads_and_windows_by_hand() -> None:
    """Mistral: three products in the feed-forward, a quarter of the keys and values, the nearest 4,096 tokens."""
    config = PUBLISHED["mistralai/Mistral-7B-v0.1"]
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    found, attention = count_flops(config, Spec.of(config)), 32 * 2 * 2 * 4096
    assert found == Flops(2 * 32 * layer, 0, 2 * 32000 * 4096, ((4096, 2 * 32 * (128 + 128)),) * 32)
    for length, seen in ((6000, 4096), (1000, 1000)):
        one = found.of([Encoded((5,) * (length + 1), length)])
        assert one == length * 2 * 32 * layer + attention * length * seen + 2 * 32000 * 4096


def test_the_head_runs_at_targets_alone() -> None:
    found = count_flops(OPT125M, DENSE)
    assert found.of([Encoded((5,) * 20, 18)]) == 19 * found.token + 19**2 * found.pair + 2 * found.target


def test_frozen_parts_cost_less() -> None:
    """One layer of twelve trains: its three products, the two through those above, one through those below."""
    one = marks(OPT125M, DENSE, False)
    one["layers"]["8"] = marks(OPT125M, DENSE)["layers"]["8"]
    layer = 12 * 768**2
    attention = 2 * 12 * (64 + 64)
    expected = Flops(layer * (8 * 2 + 6 + 3 * 4), attention * (8 + 3 + 3 * 3), 4 * 50272 * 768)
    assert count_flops(OPT125M, DENSE, one) == expected


OPT = Architecture(512, 64, 2, 2, 256, 64, 32, pre_norm=False)
LLAMA = Architecture(
    *(512, 64, 2, 4, 160, 64, 64), num_kv_heads=2, head_size=32, norm="rms", gated=True, bias=False, rotary=Rotary(),
    activation="silu", position_offset=0, tied=False, qk_norm=True, family="llama",
)  # fmt: skip


@pytest.mark.parametrize("config", [OPT, LLAMA], ids=["opt", "llama"])
def test_xla_counts_the_same_products(
    random_params: Callable[[Architecture, Spec, float], Params], config: Architecture
) -> None:
    """All rows full and every position a target; XLA also counts what is no product: a few per cent."""
    spec = Spec.of(config)
    model = Model(config, spec, random_params(config, spec, 0.3))
    examples = [Encoded((5,) * 33, 1)] * 8
    batch = jax.tree.map(jnp.asarray, pack_update(examples, (1, 8), 32, 32))
    for chosen in (everything(model.params), layer_mask(model.params, {1})):
        masters, frozen = split(model.params, chosen)
        loss = partial(completion_loss, model.config, model.spec, model.how.replace(kernels="xla"))
        program = jax.jit(partial(gradients, loss)).lower(masters, frozen, None, batch).compile()
        expected = count_flops(model.config, model.spec, chosen)
        np.testing.assert_allclose(program.cost_analysis()["flops"], expected.of(examples), rtol=0.04)
