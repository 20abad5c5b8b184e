"""Rows of a table as the plain rows that pictures are drawn from."""

from collections.abc import Sequence

from chai_jax.run.environment import where_computed
from lab.options import Record


def where() -> str:
    """Device and dtype, for a caption."""
    found = where_computed()
    return f"{found['device']}, {found['compute_dtype']}"


def tradeoff(rows: Sequence[Record]) -> tuple[list[Record], str]:
    """Accuracy (%), latency (ms/token) and KV reduction (%), and the caption that says of what."""
    points = [
        {
            "label": one["row"],
            "accuracy": 100 * one["acc"]["mean"],
            "latency": one["latency"]["decode_ms_per_token"]["mean"],
            "reduction": 100 * one["kv_reduction"]["mean"],
        }
        for one in rows
    ]
    first, timed = rows[0], rows[0]["latency"]
    caption = (
        f"{first['model']}, {first['task']}, n = {first['n']}; means over seeds {', '.join(map(str, first['seeds']))}; "
        f"latency: median of {timed['n']} rounds, batch {timed['batch']}, {timed['device']}, {timed['dtype']}."
    )
    return points, caption
