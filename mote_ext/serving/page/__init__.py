"""The page at /: one file without anything from elsewhere, which its Content-Security-Policy makes sure of."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


async def page_response(request: Request) -> Response:
    text, policy = _page()
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The file and its policy: its own script and style, named by their hashes, and this server to talk to; no more."""
    text = (Path(__file__).parent / "index.html").read_text(encoding="utf-8")
    allowed = {kind: " ".join(_hashes(text, kind)) for kind in ("script", "style")}
    rules = [
        "default-src 'none'",
        f"script-src {allowed['script']}",
        f"style-src {allowed['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return text, "; ".join(rules)


def _hashes(text: str, tag: str) -> list[str]:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies]
