"""What a load says of a server: rates, percentiles, what went wrong; and how far the client itself decided them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from chai_jax.bench.load import Load, Measured
from chai_jax.bench.load_answers import UNFINISHED, Answer
from chai_jax.inputs.reading import Record
from chai_jax.report.tables import Column, number

PERCENTILES = (50, 95, 99)
LATE = 0.010  # seconds at p95 by which the client may be late itself before its figures are marked
BUSY = 0.8  # of one core, which is all that the client's event loop has; likewise
MEASURES = {
    "first_token_ms": "time to first token, ms",
    "per_token_ms": "time per token, mean of an answer, ms",
    "gap_ms": "between two pieces of text, ms",
    "latency_ms": "whole answer, ms",
    "late_ms": "sent late by the client, ms",
    "loop_late_ms": "client's event loop late, ms",
}
COLUMNS: tuple[Column, ...] = (
    ("from when a request was due", lambda row: row["measure"]),
    ("n", lambda row: f"{row['n']:,}"),
    *((name, lambda row, name=name: number(row[name], ",.1f")) for name in ("mean", "p50", "p95", "p99")),
)
TOTALS: tuple[Column, ...] = (("figure", lambda row: row["figure"]), ("in all", lambda row: row["value"]))


def spread(seconds: Sequence[float]) -> Record:
    """Number, mean and percentiles, in milliseconds; between two values a percentile is interpolated."""
    if not seconds:
        return {"n": 0, "mean": None, **{f"p{part}": None for part in PERCENTILES}}
    values = 1e3 * np.asarray(seconds)
    parts = np.percentile(values, PERCENTILES)
    return {"n": len(values), "mean": float(values.mean())} | {
        f"p{part}": float(value) for part, value in zip(PERCENTILES, parts, strict=True)
    }


def summary(load: Load, measured: Measured, interrupted: bool) -> Record:
    """All figures. Durations are of answers that came to their end; rates are their sums over the whole span.

    The span is from when the first request was due to the last end of one, however it ended.
    """
    answers = measured.answers
    good = [answer for answer in answers if answer.good]
    ended = [answer for answer in answers if answer.outcome != UNFINISHED]
    span = max(answer.end for answer in ended) - min(answer.due for answer in answers) if ended else 0.0
    tokens = sum(answer.tokens for answer in good)
    known = bool(good) and all(answer.prompt_tokens is not None for answer in good)
    prompts = sum(answer.prompt_tokens or 0 for answer in good) if known else None
    figures: Record = {
        "asked": load.requests,
        "sent": len(answers),
        "answered": len(good),
        "outcomes": dict(Counter(answer.outcome for answer in answers).most_common()),
        "messages": _messages(answers),
        "finishes": dict(Counter(str(answer.finish) for answer in good).most_common()),
        "seconds": span,
        "requests_per_second": _rate(len(good), span),
        "prompt_tokens_per_second": _rate(prompts, span),
        "new_tokens_per_second": _rate(tokens, span),
        "prompt_tokens": prompts,
        "new_tokens": tokens,
        "counted_by": dict(Counter("pieces" if answer.told is None else "usage" for answer in good)),
        "most_at_once": measured.most_at_once,
        "first_token_ms": spread([answer.first for answer in good if answer.first is not None]),
        "per_token_ms": spread([answer.per_token for answer in good if answer.per_token is not None]),
        "gap_ms": spread([gap for answer in good for gap in answer.gaps]),
        "latency_ms": spread([answer.latency for answer in good]),
        "late_ms": spread([answer.sent - answer.due for answer in answers if answer.sent]),
        "loop_late_ms": spread(measured.loop_late),
        "client_cpu": _rate(measured.cpu, span),
        "interrupted": interrupted,
    }
    late = [figures[name]["p95"] or 0.0 for name in ("late_ms", "loop_late_ms")]
    figures["client_limited"] = max(late) > 1e3 * LATE or (figures["client_cpu"] or 0.0) > BUSY
    return figures | {"notes": notes(figures)}


def _rate(amount: float | None, span: float) -> float | None:
    return amount / span if span > 0 and amount is not None else None


def _messages(answers: Sequence[Answer]) -> dict[str, str]:
    """The first message of every outcome that has one."""
    return {answer.outcome: answer.message for answer in reversed(answers) if answer.message}


def notes(figures: Record) -> list[str]:
    """What whoever reads the figures must know, a sentence each."""
    found = []
    late, loop, cpu = (figures[name] for name in ("late_ms", "loop_late_ms", "client_cpu"))
    if figures["client_limited"]:
        found.append(
            f"this client was too slow: it sent {number(late['p95'], ',.1f')} ms late at p95, its event loop was "
            f"{number(loop['p95'], ',.1f')} ms late, and it took {number(cpu, '.0f', 100)} % of one core; the figures "
            "are partly its own: lower the load, or give it a core for itself"
        )
    asked, sent, good = figures["asked"], figures["sent"], figures["answered"]
    if figures["interrupted"]:
        found.append(f"stopped early: {good:,} answers had come to their end")
    elif asked is not None and sent < asked:
        found.append(f"{sent:,} of {asked:,} requests were sent when the time was up")
    if good < sent:
        others = {name: count for name, count in figures["outcomes"].items() if name != "200"}
        kinds = ", ".join(f"{name} x {count:,}" for name, count in others.items())
        found.append(f"{sent - good:,} of {sent:,} requests were not answered to the end: {kinds}")
        found += [f"{name}: {figures['messages'][name]}" for name in others if name in figures["messages"]]
    pieces = figures["counted_by"].get("pieces")
    if pieces:
        found.append(
            f"the server did not say how many tokens {pieces:,} of {good:,} answers have; pieces of text were counted"
        )
    if 0 < good < 100:
        found.append(f"p99 of {good:,} answers is about the longest")
    return found


def rows(figures: Record) -> list[Record]:
    """The table of durations."""
    return [{"measure": words, **figures[name]} for name, words in MEASURES.items()]


def totals(figures: Record) -> list[Record]:
    """The table of what is one number."""
    outcomes = ", ".join(f"{name} x {count:,}" for name, count in figures["outcomes"].items()) or "-"
    lines: list[tuple[str, Any]] = [
        ("requests/s", number(figures["requests_per_second"], ",.2f")),
        ("prompt tokens/s", number(figures["prompt_tokens_per_second"], ",.1f")),
        ("new tokens/s", number(figures["new_tokens_per_second"], ",.1f")),
        ("seconds", number(figures["seconds"], ",.1f")),
        ("answered / sent", f"{figures['answered']:,} / {figures['sent']:,}"),
        ("how they ended", outcomes),
        ("most at once", f"{figures['most_at_once']:,}"),
    ]
    return [{"figure": name, "value": value} for name, value in lines]
