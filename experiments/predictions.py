"""Whether the planner's predictions put plans in order: predicted against measured KL of many plans.

    python experiments/predictions.py $MODEL --text wiki.test.raw --calibration corpus.txt --costs costs.json --seeds 0

Plans of equal bytes differ by layers that are pinned at random, which stay in bfloat16, so that the others have less.
Predictions are of calibration text, the measurement is of the first --windows windows of another text. Nothing is
trained. The costs are those that `experiments/few_bits.py` keeps; without them they are measured first.

Expected: a rank correlation above 0.9 over all plans, less among plans of one budget, which differ less. Writes
predictions.json, .csv and .md.
"""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from chai_jax.analyse.budget import Budget, plan_within
from chai_jax.analyse.damage import Damage
from chai_jax.analyse.explain import cache_fraction
from chai_jax.analyse.probe import Probe
from chai_jax.compress.basis_stream import BasisStream
from chai_jax.compress.key_basis import in_one_program
from chai_jax.console import track
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.layerwise import through_layer
from chai_jax.model.model import Model
from chai_jax.plans.formats import BASIS, STORAGES
from chai_jax.plans.plan import Plan
from chai_jax.plans.planned import planned_layer
from chai_jax.report.tables import Column
from chai_jax.run.options import parse_list
from lab.damage import whole_windows
from lab.options import Common, Record, start
from lab.publish import publish
from lab.texts import calibrated

COLUMNS: tuple[Column, ...] = (
    ("plans", lambda row: row["plans"]),
    ("n", lambda row: str(row["n"])),
    ("a token, % of bfloat16", lambda row: "{:.1f} to {:.1f}".format(*row["token"])),
    ("predicted KL", lambda row: "{:.4f} to {:.4f}".format(*row["predicted"])),
    ("measured KL", lambda row: "{:.4f} to {:.4f}".format(*row["measured"])),
    ("measured / predicted, median", lambda row: f"{row['ratio']:.2f}"),
    ("Spearman", lambda row: f"{row['spearman']:.3f}"),
)


@dataclass(frozen=True)
class PredictionOptions(Common):
    text: Path | None = None
    """What damage is measured on: a text file, plain or .gz."""
    calibration: Path | None = None
    """What plans are made on: another one."""
    costs: Path | None = None
    """The planner's measurements, of the same formats, tokens and seed."""
    windows: int = 8
    budgets: str = "0.3,0.25,0.2,0.16"
    """Bytes of a token as fractions of the dense bfloat16 cache, with commas."""
    plans: int = 6
    """Of each budget."""
    pinned: float = 0.1
    """Layers that are pinned at most, as a fraction of all."""
    formats: str = ",".join(BASIS)
    tokens: int = 1024
    """Of the calibration text, to measure costs on."""


def plans_of(model: Model, seen: Probe, options: PredictionOptions) -> list[Plan]:
    """Plans with layers pinned at random: none in the first of each budget."""
    random, layers = np.random.default_rng(options.seed_numbers[0]), model.config.num_layers
    storages = tuple(parse_list("--formats", options.formats, STORAGES))
    made = []
    for part in [float(part) for part in options.budgets.split(",")]:
        for number in range(options.plans):
            count = number and random.integers(1, max(2, round(options.pinned * layers) + 1))
            pinned = tuple(int(layer) for layer in random.choice(layers, count, replace=False))
            budget = Budget(part, None, (), storages, pinned, ranks=False, tokens=options.tokens)
            made.append(plan_within(model, seen, budget, seed=options.seed_numbers[0], file=options.costs))
    return made


def measured(model: Model, seen: Probe, plans: list[Plan], tokens: np.ndarray) -> list[float]:
    """KL of each plan as a whole. All go through the layers together, so that each basis is found once."""
    mask = np.ones(tokens.shape, bool)
    damage, stream, config = Damage(model, tokens, mask), BasisStream(model, seen), model.config
    states = [damage.entering[0]] * len(plans)
    for index in track(range(config.num_layers), "Measuring plans"):
        params = damage.model.params["layers"][str(index)]
        for at, plan in enumerate(plans):
            wanted = plan.layers[index]
            spec, own = planned_layer(wanted, "dense", config), params
            if wanted.channels:
                channels, basis = in_one_program(stream.params(wanted.channels), wanted.channels, config.head_dim)
                spec, own = spec.stored_as(spec.storages, channels), {**params, "basis": basis}
            states[at] = through_layer(model, spec, own, states[at], jnp.asarray(mask))
        stream.advance()
    return [damage.between(x)[0] for x in states]


def predictions(options: PredictionOptions) -> Record:
    """All plans of one model, then those of each budget."""
    if options.text is None or options.calibration is None or options.windows < 1 or len(options.model) != 1:
        raise InputError("expected one model, --text FILE, --calibration FILE and at least one of --windows")
    model = load(options.model[0], storage="bfloat16")
    seen = calibrated(model, options.calibration)
    plans = plans_of(model, seen, options)
    found = np.asarray(measured(model, seen, plans, whole_windows(model.tokenizer, options.text, 512, options.windows)))
    expected = np.asarray([plan.predicted for plan in plans])
    token = np.asarray([cache_fraction(plan, model.config) for plan in plans])
    groups = {"all": slice(None)}
    for at, part in enumerate(options.budgets.split(",")):
        groups[f"of {100 * float(part):g} %"] = slice(at * options.plans, (at + 1) * options.plans)
    rows = [
        {
            "plans": name,
            "n": len(found[some]),
            "token": [100 * float(token[some].min()), 100 * float(token[some].max())],
            "predicted": [float(expected[some].min()), float(expected[some].max())],
            "measured": [float(found[some].min()), float(found[some].max())],
            "ratio": float(np.median(found[some] / expected[some])),
            "spearman": float(spearmanr(expected[some], found[some])[0]),
            "each": np.stack([expected[some], found[some]], axis=1).tolist() if name == "all" else [],
        }
        for name, some in groups.items()
    ]
    return publish(options, "predictions", "Predicted and measured damage", rows, COLUMNS)


if __name__ == "__main__":
    start(predictions, PredictionOptions, __doc__)
