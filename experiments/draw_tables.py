"""Draw the tables of README.md and docs/ anew from what the experiments wrote under experiments/results/.

    python experiments/draw_tables.py           # rewrites the pages
    python experiments/draw_tables.py --check   # status 1 if a page is not what it would write

A table stands between two comments, and nothing between them is written by hand:

    <!-- drawn: NAME -->
    <!-- end -->

NAME is one of `lab.pages.TABLES`, which says which file it is made of.
"""

import argparse
import re
import sys
from pathlib import Path

from chai_jax.files.atomic import write_text
from lab.pages import TABLES

ROOT = Path(__file__).resolve().parents[1]
DRAWN = re.compile(r"(<!-- drawn: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def drawn(text: str) -> str:
    """The page with its tables as they are now."""
    return DRAWN.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]().strip()}\n\n{found[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page would change")
    check = parser.parse_args().check
    before = {page: page.read_text(encoding="utf-8") for page in pages()}
    after = {page: drawn(text) for page, text in before.items()}
    changed = [page for page in before if after[page] != before[page]]
    for page in changed:
        print(page.relative_to(ROOT), "differs from the results" if check else "is drawn anew")
        if not check:
            write_text(page, after[page])
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
