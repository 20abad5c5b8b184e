"""How many of a draft's tokens does the model keep, and is it faster for it?

    python experiments/speculation.py $MODEL --drafts $SMALL --text $TEXT --prompts 24 --seeds 0 --out runs/speculation

The model continues the first --prompt tokens of --prompts windows spread over the text by --new-tokens, greedily, one
prompt at a time: alone, and with each draft proposing each of --counts tokens a round. Drafts are the model itself
(which shows what verification alone brings: every proposal is kept), the model with every layer clustered to each of
--clusters of its heads (qkv, without training; values fitted on windows of the text that are not asked about, or of low
rank where several queries read a key), the model with its cache stored in each of --storages, and any smaller --drafts.
All are timed in turn prompt by prompt; a ratio above 1 is a speed-up. The text must be the model alone's, token for
token; prompts where rounding decides otherwise are counted.

Writes speculation.json, .csv and .md.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chai_jax.analyse.planner import plan
from chai_jax.analyse.probe import probe
from chai_jax.compress.cluster import cluster
from chai_jax.compress.quantize import with_storage
from chai_jax.console import track
from chai_jax.data.batches import Encoded
from chai_jax.data.text import read_text_file, windows
from chai_jax.errors import InputError
from chai_jax.files.store import load
from chai_jax.model.model import Model
from chai_jax.plans.formats import BLOCKS, UNFITTED
from chai_jax.report.tables import Column, percent
from chai_jax.run.options import parse_list
from chai_jax.serve.generate import generate_tokens
from chai_jax.serve.speculate import Speculated, speculate
from lab.options import Common, Record, start
from lab.publish import publish

CALIBRATION = 64  # windows
STORED = tuple(name for name in UNFITTED if name not in BLOCKS)  # a draft's cache gives columns up
Timing = tuple[float, Speculated]  # milliseconds of a completion, and it
COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("draft", lambda row: row["draft"]),
    ("draft's KV B/token", lambda row: f"{row['draft_kv_bytes_per_token']:,}"),
    ("proposed a round", lambda row: str(row["count"])),
    ("kept ± s.e. over prompts", lambda row: f"{percent(row['acceptance'])} ± {percent(row['acceptance_stderr'])}"),
    ("tokens a round", lambda row: f"{row['tokens_per_round']:.2f}"),
    ("ms a token", lambda row: f"{row['ms_per_token']:.2f}"),
    ("speed-up, median [p10, p90]", lambda row: "{:.2f} [{:.2f}, {:.2f}]".format(*row["speed_up"])),
    ("same text", lambda row: f"{row['same']} of {row['n']}"),
)


@dataclass(frozen=True)
class SpeculationOptions(Common):
    text: Path | None = None
    """A text file, plain or .gz."""
    drafts: tuple[str, ...] = ()
    """Smaller models with MODEL's tokens: hub ids or folders."""
    clusters: str = "0.75,0.5"
    """Fractions of MODEL's heads that its clustered drafts keep, with commas."""
    storages: str = ""
    """Formats of the cache of MODEL as its own draft, with commas: weights are shared."""
    counts: str = "2,4,8"
    """Tokens proposed a round, with commas."""
    prompts: int = 24
    prompt: int = 64
    """Tokens of a prompt."""
    new_tokens: int = 64


def drafts_of(model: Model, text: Sequence[Encoded], options: SpeculationOptions) -> dict[str, Model]:
    """By name."""
    found = {"itself": model} | {Path(source).name: load(source) for source in options.drafts}
    if options.storages:
        storages = parse_list("--storages", options.storages, STORED)
        found |= {storage: with_storage(model, storage) for storage in storages}
    parts = [float(part) for part in options.clusters.split(",") if part]
    if not parts:
        return found
    looked = probe(model, [window.tokens for window in text])
    for part in parts:
        values = "fit" if model.config.queries == 1 else "low_rank"  # a fit is defined for one query a key
        merges = {"score_merge": "low_rank", "value_merge": values, "sensitivity": "attention"}
        wanted = plan(model, looked, layers=1.0, clusters=part, seed=options.seed_numbers[0], **merges)
        found[f"clusters {part:g}"] = cluster(model, wanted, looked)
    return found


def timed(model: Model, draft: Model | None, prompt: list[int], count: int, new: int) -> Timing:
    """Milliseconds of one greedy completion that no token ends, and the completion."""
    began = time.perf_counter()
    if draft is None:
        made = Speculated(generate_tokens(model, [prompt], new, stop=False)[0])
    else:
        *_, made = speculate(model, draft, prompt, new, stop=False, count=count)
    return 1e3 * (time.perf_counter() - began), made


def compare(
    model: Model, drafts: dict[str, Model], prompts: list[list[int]], options: SpeculationOptions
) -> list[Record]:
    """A row for every draft and count; the programs of all are compiled before the first clock starts."""
    counts = [int(count) for count in options.counts.split(",")]
    cases = [(name, draft, count) for name, draft in drafts.items() for count in counts]
    alone: list[Timing] = []
    found: list[list[Timing]] = [[] for _ in cases]
    for number, prompt in enumerate(track([prompts[0], *prompts], "Continuing the prompts")):
        once = [timed(model, draft, prompt, count, options.new_tokens) for _, draft, count in cases]
        mine = timed(model, None, prompt, 0, options.new_tokens)
        if number:  # the first time compiles
            alone.append(mine)
            for results, one in zip(found, once, strict=True):
                results.append(one)
    return [_row(case, results, alone) for case, results in zip(cases, found, strict=True)]


def _row(case: tuple[str, Model, int], results: list[Timing], alone: list[Timing]) -> Record:
    name, draft, count = case
    made = [completion for _, completion in results]
    times, plain = (np.array([ms for ms, _ in each]) for each in (results, alone))
    kept = np.array([completion.acceptance for completion in made], float)
    tokens = len(made[0].tokens)
    middle, low, high = np.percentile(plain / times, [50, 10, 90]).tolist()
    return {
        "draft": name,
        "draft_kv_bytes_per_token": draft.kv_bytes_per_token,
        "count": count,
        "n": len(made),
        "acceptance": float(kept.mean()),
        "acceptance_stderr": float(kept.std(ddof=1) / np.sqrt(len(kept))),
        "tokens_per_round": float(np.mean([(tokens - 1) / completion.rounds for completion in made])),
        "ms_per_token": float(np.median(times)) / tokens,
        "ms_per_token_alone": float(np.median(plain)) / tokens,
        "speed_up": [middle, low, high],
        "same": sum(a.tokens == b.tokens for (_, a), (_, b) in zip(results, alone, strict=True)),
    }


def speculation(options: SpeculationOptions) -> Record:
    """All models, one after the other."""
    if options.text is None or options.prompts < 2:
        raise InputError("expected --text FILE and at least two --prompts: the text that is continued")
    rows: list[Record] = []
    for source in options.model:
        model = load(source)
        cut = windows(model.tokenizer, read_text_file(options.text), 2 * options.prompt)
        if len(cut) < options.prompts + CALIBRATION:
            wanted = options.prompts + CALIBRATION
            raise InputError(f"{options.text} has {len(cut)} windows; expected {wanted}: choose fewer --prompts")
        asked = [len(cut) * at // options.prompts for at in range(options.prompts)]
        others = [window for at, window in enumerate(cut) if at not in asked]
        every = max(1, len(others) // CALIBRATION)
        drafts = drafts_of(model, others[::every][:CALIBRATION], options)
        prompts = [list(cut[at].tokens[: options.prompt]) for at in asked]
        rows += [{"model": Path(source).name} | row for row in compare(model, drafts, prompts, options)]
    best = max(rows, key=lambda row: row["speed_up"][0])
    found = f"fastest: {best['draft']}, {best['count']} proposed a round, {best['speed_up'][0]:.2f} x"
    return publish(options, "speculation", "Speculative decoding", rows, COLUMNS, findings=[found])


if __name__ == "__main__":
    start(speculation, SpeculationOptions, __doc__)
