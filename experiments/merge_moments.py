"""What weighing tokens by attention is worth: merges fitted to moments that do, and to moments that count all alike.

    python experiments/merge_moments.py $MODEL --text wiki.test.raw --calibration corpus.txt --out runs/moments

Every layer is changed in the same way and nothing is trained: heads cut to --part of their dimensions, latents of that
part of the width, heads merged by `low_rank` to that part of their number (and by `fit`, where a key has one query). On
the first --windows windows of the text, of --window tokens: the KL divergence of the next-token distribution from the
dense model's and the change of perplexity, each with a 95 % interval over windows, with float32 caches. Moments are
those of the first --fitted windows of the calibration text, which may share nothing with the text.

Expected of a well-trained model: the first tokens get most of the attention, and values that are cut for the average
token lose two to three times as much. Writes merge_moments.json, .csv and .md.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chai_jax.analyse.costs import latent
from chai_jax.analyse.planner import find_clusters
from chai_jax.analyse.probe import Probe, probe
from chai_jax.compress.cluster import Stream, merged_layer
from chai_jax.compress.merge import InputMoments
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.plans.plan import ClusterPlan, LayerPlan, Plan, round_up
from lab.damage import COLUMNS, ROWS, damage, figures, sizes, whole_windows
from lab.options import Common, Record, start
from lab.publish import publish

WEIGHTS = ("all alike", "by attention")


@dataclass(frozen=True)
class MomentsOptions(Common):
    text: Path | None = None
    """What damage is measured on: a text file, plain or .gz."""
    calibration: Path | None = None
    """What merges are fitted to: another one."""
    part: float = 0.75
    """Of dimensions, widths and heads that stays."""
    windows: int = 16
    window: int = 512
    """Tokens of a window."""
    fitted: int = 8
    """Windows of the calibration text."""


def plans(model: Model, seen: Probe, part: float) -> Iterator[tuple[str, Plan]]:
    """What is done to every layer."""
    config = model.config
    heads, size, width = config.kv_heads, config.head_dim, config.kv_width
    singles = tuple(ClusterPlan((head,)) for head in range(heads))
    cuts = {
        "value dimensions of a head": LayerPlan(singles, value_rank=round_up(part, size)),
        "key dimensions of a head": LayerPlan(singles, key_rank=config.even(round_up(part, size))),
        "a latent value": latent(heads, width, round_up(part, width)),
        "a latent key": latent(heads, config.even(round_up(part, width)), width),
        "latents": latent(heads, config.even(round_up(part, width)), round_up(part, width)),
    }
    low = Plan((), "qkv", score_merge="low_rank", value_merge="low_rank")
    for name, cut in cuts.items():
        layer = dataclasses.replace(cut, share=cut.share or "qkv")
        yield name, dataclasses.replace(low, layers=(layer,) * config.num_layers)
    kept = min(round_up(part, heads), heads - 1)
    clusters = tuple(LayerPlan(find_clusters(one, kept, 0)) for one in seen.correlation)
    merges = ("low_rank", "fit") if config.queries == 1 else ("low_rank",)
    for merge in merges if heads > 1 else ():
        yield f"heads, {merge}", dataclasses.replace(low, value_merge=merge, layers=clusters)


def merged(model: Model, seen: Probe, part: float) -> list[tuple[str, str, Model]]:
    """(what, weights, model) of each plan with each of `WEIGHTS`, in one pass over the layers."""
    named, stream = list(plans(model, seen, part)), Stream(model, seen)
    specs, layers = {}, {}
    for index in range(model.config.num_layers):
        alike = copy.copy(stream)
        alike.__dict__["input_moments"] = InputMoments(*[stream.input_moments.query] * 3)
        for name, plan in named:
            for weights, moments in zip(WEIGHTS, (alike, stream), strict=True):
                key = name, weights
                new, params = merged_layer(model, index, plan.layers[index], plan, moments)
                specs[key] = specs.get(key, model.spec).with_layer(index, new)
                layers[key] = {**layers.get(key, {}), str(index): params}
        stream.advance()
    return [
        (*key, model.replace(spec=spec, params={**model.params, "layers": layers[key]})) for key, spec in specs.items()
    ]


def merge_moments(options: MomentsOptions) -> Record:
    """All models, one after the other."""
    if options.text is None or options.calibration is None or options.windows < 2:
        raise InputError("expected --text FILE, --calibration FILE and at least two --windows")
    rows: list[Record] = []
    for source in options.model:
        model = load(source, storage="float32")
        tokens = whole_windows(model.tokenizer, options.text, options.window, options.windows)
        cut = windows(model.tokenizer, read_text_file(options.calibration), options.window)[: options.fitted]
        seen = probe(model, [window.tokens for window in cut], window=options.window, batch_size=ROWS)
        made = merged(model, seen, options.part)
        measured = damage(model, [each for *_, each in made], tokens, ROWS)
        for (name, weights, changed), (kl, rise) in zip(made, measured, strict=True):
            about = {"model": Path(source).name, "cache": f"{name}, tokens {weights}"}
            rows.append(about | sizes(changed, model, options.window) | figures(kl, rise))
    shown = [column for column in COLUMNS if column[0] != "a window, %"]
    return publish(options, "merge_moments", "Moments weighed by attention", rows, shown)


if __name__ == "__main__":
    start(merge_moments, MomentsOptions, __doc__)
