"""A client of any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, a paid service.

Standard library only. Texts may be harmful, so no error and no log holds a prompt or an answer; the key comes from
OPENAI_API_KEY and goes to the server alone.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

Messages = Sequence[dict[str, str]]
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0


class EndpointError(ConnectionError):
    """The server could not be used. Says which, how often it was tried and what came, never what was asked."""


class Endpoint:
    """One model on one server.

    base_url:  such as http://localhost:8000/v1; /chat/completions is put behind it
    model:     the server's name of the model
    timeout_s: of one attempt, in seconds
    attempts:  of one request; between them 1, 2, 4, … seconds, or what the server's Retry-After says, at most 30
    ValueError: an address that is none, no attempts.
    """

    def __init__(self, base_url: str, model: str, timeout_s: float = 60.0, attempts: int = 4) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"Endpoint: base_url must begin with http:// or https://, got {base_url!r}")
        if not model or attempts < 1 or timeout_s <= 0:
            raise ValueError(
                f"Endpoint: a model, attempts >= 1 and timeout_s > 0 are needed, got {model!r}, {attempts}, {timeout_s}"
            )
        self.base_url, self.model = base_url.rstrip("/"), model
        self.timeout_s, self.attempts = timeout_s, attempts

    @classmethod
    def parse(cls, text: str, **options) -> Endpoint:
        """From "URL#MODEL", as the command line has it. ValueError: no # or nothing on one side of it."""
        base_url, _, model = text.partition("#")
        if not base_url or not model:
            raise ValueError(f"an endpoint is written URL#MODEL, such as http://localhost:8000/v1#llama, got {text!r}")
        return cls(base_url, model, **options)

    def complete(self, messages: Messages, *, max_tokens: int = 512, temperature: float = 0.0) -> str:
        """The assistant's text. EndpointError: refused, unreachable after all attempts, or an answer without a text."""
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        return self._text(self._post(json.dumps(body).encode()))

    def complete_many(
        self, conversations: Sequence[Messages], *, max_tokens: int = 512, temperature: float = 0.0, threads: int = 8
    ) -> list[str]:
        """complete for each, in order, a few at a time. EndpointError: the first that failed; the rest are not sent."""
        pool = ThreadPoolExecutor(max(1, min(threads, len(conversations))))
        try:
            futures = [
                pool.submit(self.complete, messages, max_tokens=max_tokens, temperature=temperature)
                for messages in conversations
            ]
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)

    def _post(self, body: bytes) -> bytes:
        url = f"{self.base_url}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        why, wait_s = "", FIRST_WAIT_S
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(wait_s)
                wait_s = min(wait_s * 2, LONGEST_WAIT_S)
            try:
                request = urllib.request.Request(url, data=body, headers=headers, method="POST")
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"  # not its body, which may repeat the prompt
                error.close()
                if error.code not in RETRIED:
                    raise EndpointError(f"{url} refused the request for model {self.model!r}: {why}") from None
                wait_s = _retry_after(error.headers.get("Retry-After"), wait_s)
            except (OSError, http.client.HTTPException) as error:  # unreachable, reset, timed out, cut off
                why = type(getattr(error, "reason", error)).__name__
        raise EndpointError(f"{url} gave no answer in {self.attempts} attempts: {why}")

    def _text(self, reply: bytes) -> str:
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise EndpointError(
                f"{self.base_url} answered in another form than chat completions (model {self.model!r})"
            )
        return content


def _retry_after(value: str | None, otherwise: float) -> float:
    """Seconds the server asks for, if it says a number of them."""
    try:
        return min(max(float(value), 0.0), LONGEST_WAIT_S)
    except (TypeError, ValueError):
        return otherwise
