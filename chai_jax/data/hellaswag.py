"""HellaSwag's rows, prepared as lm-evaluation-harness 0.4.13 does (`lm_eval/tasks/hellaswag/utils.py`)."""

import re
from typing import Any

from chai_jax.data.multiple_choice import require_text, require_texts
from chai_jax.errors import InputError


def clean(text: str) -> str:
    """A text without what WikiHow's pages left in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def prepare(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with the `query` and the `choices` that the harness makes of it, and its label as a number.

    Args:
        row: with the columns of the Hugging Face data set, `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label`
            (a string there), or with `ctx` in place of the first three: "ACTIVITY: CONTEXT", joined already.
        where: what messages call the row.

    Raises:
        InputError: it has neither, or a column of the wrong type.
    """
    if "ctx_a" not in row and "ctx" in row:
        activity, colon, context = require_text(row, "ctx", where).partition(": ")
        if not colon:
            raise InputError(f"{where} has ctx = {activity!r:.40}; expected 'ACTIVITY: CONTEXT', or ctx_a and ctx_b")
        row = {**row, "activity_label": activity, "ctx_a": context, "ctx_b": ""}
    for column in ("activity_label", "ctx_a", "ctx_b", "endings", "label"):
        if column not in row:
            raise InputError(
                f"{where} has no column {column!r}; expected activity_label, ctx_a, ctx_b (or ctx), endings and label"
            )
    activity, before, after = (require_text(row, column, where) for column in ("activity_label", "ctx_a", "ctx_b"))
    endings, label = require_texts(row, "endings", where), row["label"]
    return {
        "activity_label": activity,
        "ctx_a": before,
        "ctx_b": after,
        "endings": endings,
        "query": clean(f"{activity}: {before} {after.capitalize()}"),
        "choices": [clean(ending) for ending in endings],
        "label": int(label) if isinstance(label, str) and re.fullmatch("[0-9]", label) else label,
    }
