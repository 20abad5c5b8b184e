"""`chai-jax report`: what runs did and found, on one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class ReportCommand:
    """Write one HTML page about finished runs: tables, pictures, settings, and how to get them again.

    The page holds all it shows: it can be sent as a file, asks for nothing from the network, and runs no scripts.
    """

    runs: Positional[tuple[Path, ...]]
    """Folders that `chai-jax run` wrote; of several the page also compares the last stages."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """Where to write the page."""

    def run(self) -> Any:
        from chai_jax.errors import InputError
        from chai_jax.files.atomic import claim_file
        from chai_jax.report.page import write_page

        if not self.runs:
            raise InputError("no RUN; expected one or more folders that chai-jax run wrote")
        return write_page(self.runs, claim_file(self.out))
