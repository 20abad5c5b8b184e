"""An experiment's files: NAME.json (everything), NAME.csv (the rows) and NAME.md (for people, the paper beside it)."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from chai_jax.files.atomic import write_json, write_text
from chai_jax.report.tables import Column, as_csv, markdown
from chai_jax.run.environment import versions, where_computed
from lab.options import Record
from lab.paper import Claim


class Asked(Protocol):
    """What is said of an experiment's options."""

    @property
    def out(self) -> Path: ...

    @property
    def command(self) -> str: ...

    @property
    def seed_numbers(self) -> tuple[int, ...]: ...


def publish(
    options: Asked,
    name: str,
    title: str,
    rows: Sequence[Record],
    columns: Sequence[Column],
    claims: Sequence[Claim] = (),
    findings: Sequence[str] = (),
    **beside: Any,
) -> Record:
    """Write the three files; returns what the last line of stdout says.

    Args:
        claims: what the paper prints for the same, and why it differs.
        findings: sentences that were computed from the rows.
        beside: more for the JSON file.
    """
    about = {
        "experiment": name,
        "command": options.command,
        "date": datetime.date.today().isoformat(),
        "seeds": list(options.seed_numbers),
        **where_computed(),
        "versions": versions(),
    }
    whole = {
        **about,
        "findings": list(findings),
        "rows": list(rows),
        **beside,
        "paper": [one.to_json() for one in claims],
    }
    write_json(options.out / f"{name}.json", whole)
    write_text(options.out / f"{name}.csv", as_csv(rows))
    write_text(options.out / f"{name}.md", page(title, about, rows, columns, claims, findings))
    return {"out": str(options.out / f"{name}.md"), "rows": len(rows), "findings": list(findings)}


def page(
    title: str,
    about: Record,
    rows: Sequence[Record],
    columns: Sequence[Column],
    claims: Sequence[Claim],
    findings: Sequence[str],
) -> str:
    """The Markdown file."""
    software = ", ".join(f"{name} {about['versions'][name]}" for name in ("python", "jax", "chai_jax"))
    parts = [
        f"# {title}",
        f"`{about['command']}`",
        f"{about['date']}, {about['device']}, {about['compute_dtype']}; seeds {', '.join(map(str, about['seeds']))}; "
        f"{software}.",
        markdown(rows, columns).rstrip(),
        "\n".join(f"- {finding}" for finding in findings),
        *(part for one in claims for part in (f"## The paper: {one.title}", one.table(), one.why)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
