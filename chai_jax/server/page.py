"""The page at `/`: one file, which asks nobody but its own server for anything."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import Response


@cache
def _page() -> tuple[str, str]:
    """The page, and the policy by which a browser runs its own script and style and nothing else."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def digest(element: str) -> str:
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def page_response() -> Response:
    text, policy = _page()
    return Response(text, headers={"Content-Security-Policy": policy}, media_type="text/html")
