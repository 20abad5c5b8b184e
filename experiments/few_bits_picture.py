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
    "SmolLM2-135M, WikiText-2, windows of 512 tokens (planner {planned}, formats the first {ours} of these, others' "
    "the first {others}); bars: 95 % intervals over windows. No training."
)


def rows_of(name: str) -> list[Record]:
    rows: list[Record] = json.loads((RESULTS / name).read_text())["rows"]
    return [row | {"model": "SmolLM2-135M"} for row in rows]


def draw() -> None:
    ours, planned, rivals = map(rows_of, ("few_bits.json", "planner/few_bits.json", "rivals.json"))
    planned = [row for row in planned if row["predicted"]]
    rivals = [row for row in rivals if row["group"] != "ours"]
    kinds = ["one format of ours"] * len(ours) + ["planner, keys in a basis"] * len(planned)
    caption = CAPTION.format(planned=planned[0]["n"], ours=ours[0]["n"], others=rivals[0]["n"])
    frontier(RESULTS / "frontier", ours + planned + rivals, kinds + [row["group"] for row in rivals], caption)


if __name__ == "__main__":
    draw()
