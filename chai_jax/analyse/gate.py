"""A sanity gate: how far surgery moved a model's predictions, and which layer moved them most."""

from dataclasses import dataclass

import numpy as np

from chai_jax.analyse.damage import Damage
from chai_jax.compress.calibration import evenly_spaced
from chai_jax.compress.quantize import quantize
from chai_jax.model.layerwise import Text
from chai_jax.model.model import Model
from chai_jax.plans.plan import Plan

GATE_TOKENS = 1024  # of calibration text that are looked at, about


@dataclass(frozen=True)
class Gate:
    """Mean KL(before || after) of next-token distributions in nats per token, over `tokens` predictions.

    Attributes:
        layer: the one that moves them most when it alone is changed; `layer_kl` is by how much.
    """

    kl: float
    layer: int
    layer_kl: float
    tokens: int

    @classmethod
    def between(cls, before: Model, after: Model, text: Text) -> "Gate":
        """Compare two models of the same depth on a few prompts."""
        damage = Damage(before, *evenly_spaced(text, GATE_TOKENS))
        layers = enumerate(after.spec.layers)
        alone = [damage.of(index, layer, after.params["layers"][str(index)])[0] for index, layer in layers]
        worst = int(np.argmax(alone))
        return cls(damage.of_model(after)[0], worst, alone[worst], len(damage.targets))

    def explain(self, limit: float) -> str:
        """What is wrong, and where to look."""
        return (
            f"moved the next-token distribution by {self.kl:.3f} nats per token (KL, {self.tokens} tokens; expected "
            f"{limit:g} at most); layer {self.layer} alone does {self.layer_kl:.3f}: merge less of it, or pin it"
        )


def measured_kl(dense: Model, clustered: Model, plan: Plan, text: Text) -> float:
    """KL(dense || clustered, and stored in the plan's formats) in nats per token.

    The planner's prediction (`Plan.predicted`) is to be compared with it.
    """
    return Damage(dense, *evenly_spaced(text, GATE_TOKENS)).of_model(quantize(clustered, plan, text))[0]
