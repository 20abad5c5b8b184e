"""The cross-entropy of completions: its gradient is torch's, and it falls."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chai_jax.adapt import finetune as module
from chai_jax.adapt import step as steps
from chai_jax.adapt.finetune import (
    completion_loss,
    cross_entropy,
    finetune,
    sum_over_targets,
    training_execution,
)
from chai_jax.adapt.updates import pack_update
from chai_jax.config import FinetuneConfig, TrainConfig
from chai_jax.data.batches import Encoded
from chai_jax.files.store import load
from chai_jax.model.model import Model

SHAPES = {
    "pre-norm": {"word_embed_proj_dim": 16},
    "post-norm, projected embeddings": {"word_embed_proj_dim": 8, "do_layer_norm_before": False},
}


def torch_loss(torch: ModuleType, network: Any, examples: list[Encoded]) -> Any:
    """transformers' own loss: the mean over all labels that are not -100."""
    width = max(len(example.tokens) for example in examples)
    tokens = torch.ones(len(examples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length], mask[row, :length] = torch.tensor(example.tokens), 1
        labels[row, example.start : length] = tokens[row, example.start : length]
    return network(tokens, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_torchs(torch: ModuleType, tmp_path: Path, examples: list[Encoded], shape: str) -> None:
    """Over two microbatches, for every parameter; gradients come back through the loader's own table of names."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    network = OPTForCausalLM(OPTConfig(**sizes, **SHAPES[shape], max_position_embeddings=32, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "weights")
    model = load(tmp_path / "weights")
    masters, frozen = steps.split(model.params, steps.everything(model.params))
    loss = partial(completion_loss, model.config, model.spec, training_execution(model, TrainConfig()))
    ours, means = jax.jit(partial(steps.gradients, loss))(masters, frozen, None, pack_update(examples, (2, 8), 32, 6))

    expected = torch_loss(torch, network, examples)
    expected.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.grad)
    network.save_pretrained(tmp_path / "gradients")
    theirs = load(tmp_path / "gradients").params
    assert abs(float(means["loss"]) - float(expected.detach())) <= 1e-5
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), ours, theirs)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(theirs)) > 1e-2


def test_steps_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch, examples: list[Encoded]) -> None:
    """Sums and gradients are those of all logits at once, whether the head takes all eight columns or two."""
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), pack_update(examples, (1, 16), 32, 6))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8, 53)), jnp.float32)

    def total(hidden: Any) -> Any:
        def step(positions: Any, targets: Any, weights: Any, teacher: None) -> steps.Sums:
            logits = jnp.take_along_axis(hidden, positions[..., None] % 8, axis=1)
            return {"loss": (weights * cross_entropy(logits, targets)).sum()}

        return sum_over_targets(step, batch)["loss"]

    def all_at_once(hidden: Any) -> Any:
        logprobs = jax.nn.log_softmax(jnp.take_along_axis(hidden, batch.positions[..., None] % 8, axis=1))
        return -(jnp.take_along_axis(logprobs, batch.targets[..., None], 2)[..., 0] * batch.weights).sum()

    expected = jax.jit(jax.value_and_grad(all_at_once))(hidden)
    for rows in (1024, 32):
        monkeypatch.setattr(module, "HEAD_ROWS_TRAINED", rows)
        found = jax.jit(jax.value_and_grad(total))(hidden)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_learns_what_can_be_learned(tiny: Callable[..., Model]) -> None:
    """The answer repeats the last token; with an int8 cache."""
    random = np.random.default_rng(0)
    texts = random.integers(4, 53, (64, 3)).tolist()
    examples = [Encoded((2, *text, text[-1]), 4) for text in texts]
    config = TrainConfig(lr=1e-2, batch=32, accumulation=2, epochs=30)
    log: list[dict[str, Any]] = []
    model = tiny(storage="int8")
    tuned = finetune(model, examples, FinetuneConfig(config), log.append)
    assert log[0]["loss"] > 4
    assert log[-1]["loss"] < 0.5
    assert (tuned(np.array([[2, *text] for text in texts]))[:, -1].argmax(-1) == np.array(texts)[:, -1]).mean() > 0.9
