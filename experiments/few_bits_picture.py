"""One picture of all measured caches of few bits, ours and others': KL against bytes.

    python experiments/few_bits_picture.py

Reads what few_bits.py and rivals.py have left in experiments/results/few_bits; writes frontier.png, .svg, .csv there.
"""

import json
from pathlib import Path

from lab.damage import frontier
from lab.options import Record

RESULTS = Path(__file__).parent / "results" / "few_bits"
CAPTION = (
    "SmolLM2-135M, WikiText-2, the first {ours} windows of 512 tokens (others' caches: the first {others}); bars: 95 % "
    "intervals over windows. No training. The bound is of codes that keep no token whole; ours keep 68 of the 512."
)
BOUND = "bound, if all tokens had few bits"


def rows_of(name: str) -> list[Record]:
    rows: list[Record] = json.loads((RESULTS / name).read_text())["rows"]
    return [row | {"model": "SmolLM2-135M"} for row in rows]


def kind_of(row: Record) -> str:
    if row["predicted"] is not None:
        return "planner, keys in a basis"
    return "one format of ours, keys in a basis" if "keys" in row["cache"] else "one format of ours"


def draw() -> None:
    ours, rivals = map(rows_of, ("few_bits.json", "rivals.json"))
    rivals = [row for row in rivals if row["group"] != "ours"]
    kinds = [*map(kind_of, ours), *(row["group"] for row in rivals)]
    planned = [row for row in ours if row["predicted"] is not None]
    bound = [row | {"cache": BOUND, "kl": 3 * [row["bound"]]} for row in planned]
    caption = CAPTION.format(ours=ours[0]["n"], others=rivals[0]["n"])
    frontier(RESULTS / "frontier", ours + rivals + bound, kinds + [BOUND] * len(bound), caption)


if __name__ == "__main__":
    draw()
