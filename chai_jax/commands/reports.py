"""`chai-jax report`: what runs did and found, on one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from chai_jax.commands.options import OutFile


@dataclass(frozen=True)
class ReportCommand:
    """Write one HTML page about finished runs: tables, pictures, settings, the commands to repeat them."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN ...")]
    """Folders that `chai-jax run` wrote. If there are several, the page also compares their last stages."""
    out: OutFile = Path("report.html")
    """The page. It needs no other file, no network and no scripts, so you can send it as it is."""

    def run(self) -> Any:
        from chai_jax.errors import InputError
        from chai_jax.files.atomic import claim_file
        from chai_jax.report.page import write_page

        if not self.runs:
            raise InputError("no RUN; expected one or more folders that chai-jax run wrote")
        return write_page(self.runs, claim_file(self.out))
