"""From the planning options of the command line to a plan."""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from chai_jax.analyse.budget import Budget
from chai_jax.analyse.cluster import cluster_count
from chai_jax.analyse.explain import cache_fraction
from chai_jax.analyse.planner import grouped_plan
from chai_jax.analyse.planner import plan as make_plan
from chai_jax.analyse.probe import Probe, probe
from chai_jax.analyse.queries import of_kept
from chai_jax.analyse.whole_plan import plan_and_measure
from chai_jax.config import PlanConfig
from chai_jax.console import console
from chai_jax.errors import InputError
from chai_jax.machine.processes import once
from chai_jax.model.model import Model
from chai_jax.plans.architecture import Architecture
from chai_jax.plans.formats import STORAGES
from chai_jax.plans.plan import Plan, check_merges
from chai_jax.report.figures import head_maps
from chai_jax.run.work import Work


def plan_for(
    model: Model, work: Work, wanted: PlanConfig, seed: int, costs: Path | None = None, picture: Path | None = None
) -> Plan:
    """Probe a dense model on the calibration examples, and make the plan that was asked for.

    Args:
        costs: where the planner keeps its measurements for the next attempt. Several processes keep none, since some
            might find the file and others not.
        picture: where to draw the heads and their clusters: a path without suffix.
    """
    check_options(wanted, model.config)
    seen = probe(model, work.calibration, window=max(map(len, work.calibration)))
    if wanted.kv_heads is not None:
        plan = grouped_plan(model, seen, wanted.kv_heads, seed, wanted.queries)
    elif wanted.kv_budget is None:
        plan = _by_clusters(model, seen, wanted, seed)
    else:
        plan = _by_budget(model, seen, wanted, seed, costs if jax.process_count() == 1 else None)
    if picture is not None:
        caption = f"{seen.rows} calibration tokens of {work.name}."
        compared = of_kept(seen, [layer.query_clusters for layer in plan.layers])
        once(partial(head_maps, picture, plan, compared.correlation, model.config, caption))
    return plan


def check_options(wanted: PlanConfig, config: Architecture) -> None:
    """Refuse, before anything is measured, options that contradict each other or do not fit the model.

    Raises:
        InputError: naming the option.
    """
    clusters = parse_clusters(wanted.clusters or "elbow")
    if clusters != "elbow":
        cluster_count(clusters, np.zeros((config.kv_heads, 1)))
    parse_list("--storages", wanted.storages, STORAGES)
    if wanted.kv_budget is not None:
        budget_of(wanted).check_layers(config.num_layers)
    elif wanted.model_budget is not None:
        raise InputError("--model-budget is given without --kv-budget; expected both: add --kv-budget 1")
    elif wanted.pin:
        raise InputError("--pin is given without --kv-budget; only the planner reads it: leave it out")
    if wanted.queries is not None:
        _check_queries(wanted.queries, wanted, config)
    if wanted.share == "none" and wanted.kv_budget is None:
        raise InputError("--share none is given without --kv-budget; only the planner then has anything to do: add one")
    if wanted.membership == "prompt":
        _check_prompt(wanted)
    shares, score_merge, value_merge = merges_of(wanted, config)
    check_merges(config, shares, score_merge, value_merge, wanted.membership)
    if wanted.kv_heads is not None:
        _check_kv_heads(wanted.kv_heads, wanted, config)


def merges_of(wanted: PlanConfig, config: Architecture) -> tuple[tuple[str, ...], str, str]:
    """What clusters may share, and how scores and values are merged: as asked, or what is defined and does best."""
    if wanted.kv_budget is None:
        share = wanted.share or ("qk" if wanted.membership == "prompt" else "qkv")
        usual = {"scores": "representative", "values": "representative"}
        shares: tuple[str, ...] = (share,)
    else:
        usual = {"scores": "representative" if config.qk_norm else "low_rank", "values": "low_rank"}
        usual_shares = ("qkv",) if config.qk_norm else ("qkv", "kv")
        shares = () if wanted.share == "none" else (wanted.share,) if wanted.share else usual_shares
    return shares, wanted.score_merge or usual["scores"], wanted.value_merge or usual["values"]


def _check_kv_heads(count: int, wanted: PlanConfig, config: Architecture) -> None:
    """Grouped queries are made by one rule, for every layer alike."""
    others = {"--kv-budget": wanted.kv_budget, "--share": wanted.share, "--clusters": wanted.clusters}
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise InputError(f"--kv-heads is given with {given[0]}; it decides all that is merged: leave one of them out")
    check_merges(config, ("kv",), "low_rank", "low_rank")
    if count < 1 or config.kv_heads % count:
        raise InputError(
            f"--kv-heads is {count}; expected a number that divides the model's {config.kv_heads} key and value heads"
        )


def _check_queries(count: int, wanted: PlanConfig, config: Architecture) -> None:
    """Queries are merged for good, within each key head."""
    if wanted.membership == "prompt":
        raise InputError(
            "--queries is given with --membership prompt, where all weights stay; expected one of them: leave one out"
        )
    if wanted.kv_budget is not None:
        raise InputError(
            "--queries is given with --kv-budget; the planner measures merges of keys and values alone: leave one of "
            "them out"
        )
    if config.queries == 1:
        raise InputError(
            f"--queries is {count}; the model has one query for each key head, there is nothing to merge: leave it out"
        )
    if not 1 <= count <= config.queries:
        raise InputError(
            f"--queries is {count}; expected a number from 1 to {config.queries}, the queries of each key head"
        )


def _check_prompt(wanted: PlanConfig) -> None:
    """Clusters per prompt need heads that are not merged for good."""
    if wanted.kv_budget is not None:
        raise InputError(
            "--membership prompt is given with --kv-budget; the planner measures fixed clusters: leave one of them out"
        )
    score_merge = wanted.score_merge or "representative"
    Plan((), wanted.share or "qk", wanted.membership, score_merge, warmup_tokens=wanted.warmup_tokens).check()


def budget_of(wanted: PlanConfig, shares: tuple[str, ...] = ("qkv", "kv")) -> Budget:
    """What the options that go with `--kv-budget` say.

    Raises:
        InputError: a budget, a storage or a pin that cannot be.
    """
    assert wanted.kv_budget is not None
    return Budget(
        wanted.kv_budget,
        wanted.model_budget,
        shares,
        parse_list("--storages", wanted.storages, STORAGES),
        parse_numbers("--pin", wanted.pin),
        wanted.ranks,
    )


def _by_clusters(model: Model, seen: Probe, wanted: PlanConfig, seed: int) -> Plan:
    (share,), score_merge, value_merge = merges_of(wanted, model.config)
    clusters = parse_clusters(wanted.clusters or "elbow")
    if wanted.queries_alone:
        clusters = model.config.kv_heads
    return make_plan(
        model,
        seen,
        share=share,
        layers=wanted.layers or 0.0,
        first=wanted.first,
        clusters=clusters,
        rank=wanted.rank,
        score_merge=score_merge,
        value_merge=value_merge,
        sensitivity=wanted.sensitivity,
        membership=wanted.membership,
        warmup_tokens=wanted.warmup_tokens,
        queries=wanted.queries,
        seed=seed,
    )


def _by_budget(model: Model, seen: Probe, wanted: PlanConfig, seed: int, costs: Path | None) -> Plan:
    shares, score_merge, value_merge = merges_of(wanted, model.config)
    budget, merges = budget_of(wanted, shares), {"score_merge": score_merge, "value_merge": value_merge}
    plan = plan_and_measure(model, seen, budget, **merges, seed=seed, file=costs)
    reached = cache_fraction(plan, model.config)
    if reached > budget.cache:
        console.print(
            f"warning: no plan is so small: the nearest takes {reached:.3f} of the dense cache, not {budget.cache:g}",
            style="bold red",
        )
    return plan


def parse_clusters(clusters: str) -> str | int | float:
    """`--clusters`: elbow, a number, a ratio below 1, or a correlation.

    Raises:
        InputError: none of these.
    """
    if clusters == "elbow" or clusters.startswith("correlation:"):
        return clusters
    try:
        return int(clusters) if clusters.lstrip("-").isdigit() else float(clusters)
    except ValueError:
        raise InputError(
            f"--clusters is {clusters!r}; expected elbow, a number, a ratio below 1, or correlation:0.9"
        ) from None


def parse_list(option: str, given: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas between them, in the order of `allowed`."""
    names = {name.strip() for name in given.split(",") if name.strip()}
    unknown = sorted(names - set(allowed))
    if unknown or not names:
        raise InputError(f"{option} is {given!r}; expected some of {', '.join(allowed)}, with commas")
    return tuple(name for name in allowed if name in names)


def parse_numbers(option: str, given: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(number) for number in given.split(",") if number.strip())
    except ValueError:
        raise InputError(f"{option} is {given!r}; expected layer numbers with commas: 0,11") from None
