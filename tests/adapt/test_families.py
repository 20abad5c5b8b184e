"""Training of decoders beside OPT: torch's gradient, and every stage on merged heads, with gates and norms of keys."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.adapt import step as steps
from chai_jax.adapt.distil import distil
from chai_jax.adapt.finetune import completion_loss, finetune, training_execution
from chai_jax.adapt.fingerprint import training_fingerprint
from chai_jax.adapt.target import layer_mask, target
from chai_jax.adapt.updates import pack_update
from chai_jax.analyse.probe import probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import quantize
from chai_jax.config import DistilConfig, FinetuneConfig, TargetConfig, TrainConfig
from chai_jax.data.batches import Encoded
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.model.quantized import is_leaf
from chai_jax.plans.architecture import Rotary
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
Build = Callable[..., Model]
ONE = TrainConfig(lr=1e-2, batch=16, accumulation=2, max_steps=1)
LLAMA: dict[str, Any] = {
    "num_heads": 4, "num_kv_heads": 2, "head_size": 8, "norm": "rms", "gated": True, "bias": False, "tied": False,
    "activation": "silu", "rotary": Rotary(), "position_offset": 0, "family": "llama",
}  # fmt: skip
QWEN3 = {**LLAMA, "qk_norm": True, "bias": ("query", "key", "value"), "family": "qwen3"}
PYTHIA = {"num_heads": 2, "parallel": True, "activation": "gelu", "rotary": Rotary(fraction=0.5), "position_offset": 0}
KINDS = {"llama": LLAMA, "qwen3": QWEN3, "pythia": {**PYTHIA, "family": "gpt_neox"}}
SIZES = {
    "vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
TORCH = {"Llama": {"num_key_value_heads": 2, "tie_word_embeddings": True}, "GPTNeoX": {"rotary_pct": 0.5}}


@pytest.mark.parametrize("name", ["Llama", pytest.param("GPTNeoX", marks=pytest.mark.slow)])
def test_gradient_is_torchs(torch: ModuleType, tmp_path: Path, examples: list[Encoded], name: str) -> None:
    """Of the completions' mean cross-entropy, over two microbatches, for every parameter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **TORCH[name], attn_implementation="eager")
    network = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "weights")
    model = load(tmp_path / "weights", tokenizer=False)
    masters, frozen = steps.split(model.params, steps.everything(model.params))
    loss = partial(completion_loss, model.config, model.spec, training_execution(model, ONE))
    ours, means = jax.jit(partial(steps.gradients, loss))(masters, frozen, None, pack_update(examples, (2, 8), 32, 6))

    total, targets = 0.0, sum(len(each.tokens) - each.start for each in examples)
    for each in examples:
        tokens = torch.tensor([each.tokens])
        logits = network(tokens[:, :-1]).logits[0, each.start - 1 :]
        total += torch.nn.functional.cross_entropy(logits, tokens[0, each.start :], reduction="sum") / targets
    total.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.grad)
    network.save_pretrained(tmp_path / "gradients")
    theirs = load(tmp_path / "gradients", tokenizer=False).params
    assert abs(float(means["loss"]) - float(total.detach())) <= 1e-5
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), ours, theirs)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs)) > 1e-2


def merged(model: Model, kind: str) -> tuple[Model, Plan]:
    """All heads of a layer in one cluster: keys as complex numbers in fewer dimensions, where that is defined."""
    heads = (ClusterPlan(tuple(range(model.config.kv_heads)), storage="int8"),)
    if kind == "qwen3":
        plan = Plan((LayerPlan(heads, weights="int8"),), "qkv", sensitivity=(1.0,))
        return quantize(cluster(model, plan), plan), plan
    plan = Plan((LayerPlan(heads, key_rank=4, value_rank=6, weights="int8"),), "kv", sensitivity=(1.0,))
    seen = probe(model, np.random.default_rng(0).integers(4, 53, (8, 12)).tolist())
    made = quantize(cluster(model, plan, seen), plan)
    assert made.spec.layers[0].pairs
    return made, plan


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_tunes_merged_heads(tiny: Build, examples: list[Encoded], kind: str) -> None:
    """One update of each: distilled, tuned on the answers, and in its most sensitive layer alone."""
    dense = tiny(0, **KINDS[kind])
    student, plan = merged(dense, kind)
    log: list[dict[str, Any]] = []
    tuned = {
        "distil": distil(student, dense, examples, DistilConfig(ONE), log.append),
        "finetune": finetune(student, examples, FinetuneConfig(ONE), log.append),
        "target": target(student, plan, examples, TargetConfig(ONE), log.append),
    }
    assert [record["stage"] for record in log] == list(tuned)
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 1e-3 for record in log)
    marked = layer_mask(student.params, {0})
    for stage, model in tuned.items():
        assert model.spec == student.spec
        moves = steps.everything(student.params) if stage != "target" else marked
        expected = dict(jax.tree_util.tree_leaves_with_path(moves))
        olds, news = (dict(jax.tree_util.tree_leaves_with_path(m.params, is_leaf=is_leaf)) for m in (student, model))
        for path, old in olds.items():
            same = all(map(np.array_equal, *map(jax.tree.leaves, (old, news[path]))))
            assert same != expected[path], (stage, jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", ["llama", pytest.param("pythia", marks=pytest.mark.slow)])
def test_gradient_of_merged_heads_is_the_slope(tiny: Build, examples: list[Encoded], kind: str) -> None:
    """Along a random direction, against the loss a little ahead and a little behind."""
    student, _ = merged(tiny(0, **KINDS[kind]), kind)
    spec = dataclasses.replace(student.spec.layers[0].stored_as(["float32"]), weights="loaded")
    masters, frozen = steps.split(student.params, steps.everything(student.params))
    loss = partial(completion_loss, student.config, student.spec.with_layer(0, spec), training_execution(student, ONE))
    run = jax.jit(partial(steps.gradients, loss))
    batch, random = pack_update(examples, (2, 8), 32, 6), np.random.default_rng(0)
    way = jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32), masters)
    size = 1e-3 / np.sqrt(sum(float((x * x).sum()) for x in jax.tree.leaves(way)))

    def ahead(by: float) -> float:
        moved = jax.tree.map(lambda x, y: x + jnp.float32(by) * y, masters, way)
        return float(run(moved, frozen, None, batch)[1]["loss"])

    gradient = run(masters, frozen, None, batch)[0]
    slope = sum(float((x * y).sum()) for x, y in zip(*map(jax.tree.leaves, (gradient, way)), strict=True))
    assert slope == pytest.approx((ahead(10 * size) - ahead(-10 * size)) / (20 * size), rel=0.02)
    assert abs(slope * size) > 1e-5


def test_checkpoints_of_before_there_were_families_still_fit(tiny: Build, examples: list[Encoded]) -> None:
    """What they say of the model is what they said then; of other families they say all."""
    opt, llama = (
        training_fingerprint("finetune", FinetuneConfig(), model, examples, [], {})["model"]
        for model in (tiny(), tiny(**LLAMA))
    )
    assert list(opt) == [
        *("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_dim", "max_positions", "embed_dim", "pre_norm"),
        *("remove_final_norm", "bias", "activation", "norm_affine", "tied", "bos_token_id", "eos_token_id"),
        "pad_token_id",
    ]
    assert {"num_kv_heads": 2, "gated": True, "norm": "rms"}.items() <= llama.items()
    assert llama["rotary"]["theta"] == 10_000
