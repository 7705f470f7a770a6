"""Who may ask: the middleware in front of every route.

A page of another origin must not use a server on the visitor's own machine, nor may a name that is re-bound to that
machine's address (DNS rebinding): the Host must be an address, localhost or a name the operator gave, and an Origin
must be that Host. Keys are compared as digests in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mote_ext.serving.errors import RequestError

KEY_VARIABLE = "MOTE_API_KEY"
OPEN_PATHS = ("/", "/health")  # without a key
_SALTED = b"mote_ext cache salt\0"


class Keys:
    """The keys that open the server; none: everybody may ask.

    ValueError: a key that is short enough to be guessed, or holds what a header cannot.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests: list[bytes] = []
        for number, key in enumerate(keys, 1):
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"API key {number} must be at least 8 printable ASCII characters without blanks")
            self._digests.append(_digest(key))

    @classmethod
    def read(cls, file: str | None) -> Keys:
        """Those of the environment's MOTE_API_KEY and of a file, one a line; # begins a comment.

        ValueError: the variable is set, or a file given, and holds no key: an open server is not what was meant
        """
        sources = {}
        if KEY_VARIABLE in os.environ:
            sources[f"the variable {KEY_VARIABLE}"] = [os.environ[KEY_VARIABLE]]
        if file is not None:
            sources[f"--api-key-file {file}"] = Path(file).read_text().splitlines()
        keys = []
        for source, lines in sources.items():
            found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            if not found:
                raise ValueError(f"{source} holds no key; write one into it, or leave it out to serve without keys")
            keys += found
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def admits(self, authorization: str | None) -> bool:
        """Whether a header's value is "Bearer <one of the keys>". Every key is compared, whichever matches."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        found = [hmac.compare_digest(_digest(key.strip()), digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(found)

    def salt(self, authorization: str | None, asked: str = "") -> str:
        """The cache salt of the key in a header, so that who waits for a shorter prefill learns nothing of others.

        asked: the client's own salt; it divides its key's cache further and reaches no other's
        """
        key = (authorization or "").partition(" ")[2].strip() if self._digests else ""
        if not key and not asked:
            return ""
        return hashlib.sha256(_SALTED + hashlib.sha256(key.encode()).digest() + asked.encode()).hexdigest()


class Guard:
    """ASGI middleware that refuses what must not reach the routes, and adds the headers every response has.

    hosts: names beside localhost and addresses that Host may be, such as the proxy's
    """

    def __init__(self, app: ASGIApp, keys: Keys, hosts: Sequence[str] = ()) -> None:
        self.app, self.keys = app, keys
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self.require_admission(scope["path"], Headers(scope=scope))
        except RequestError as error:
            refusal = JSONResponse(error.body(), error.status, error.headers)
            await refusal(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def require_admission(self, path: str, headers: Headers) -> None:
        """RequestError: 403 a Host or Origin that is not this server's, 401 no key or a wrong one."""
        host = headers.get("host", "")
        name = _split(f"//{host}")[0]
        if not (name == "localhost" or name.endswith(".localhost") or name in self.hosts or _is_address(name)):
            raise RequestError(
                403, f"this server does not answer to the name {ascii(name[:80])}; --allow-host adds one", code="host"
            )
        origin = headers.get("origin")
        foreign = origin is not None and _split(origin)[1] != host.lower()
        # A request without Origin (a GET of an image or a script) still says where it comes from.
        embedded = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if foreign or (embedded and headers.get("sec-fetch-mode") != "navigate"):
            raise RequestError(403, "requests of other sites' pages are refused", code="cross_origin")
        if path not in OPEN_PATHS and not self.keys.admits(headers.get("authorization")):
            raise RequestError(
                401,
                "an API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                WWW_Authenticate="Bearer",
            )


def _split(address: str) -> tuple[str, str]:
    """(name, name:port) of an address, in lower case; empty where it is none, such as the origin "null"."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "").lower(), parts.netloc.lower()
    except ValueError:
        return "", ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
