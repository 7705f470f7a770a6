"""What a client is told when a request is not served, in OpenAI's form of an error."""

from __future__ import annotations

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """Ends one request with a status and an OpenAI error object.

    status:  of HTTP; below 500 it is the client's to mend
    param:   the field it is about
    code:    a word for programs
    headers: of the response, such as Retry-After
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict:
        otherwise = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, otherwise)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Stopping(RequestError):
    """The server is on its way down and takes nothing on."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down; ask another one", code="stopping", retry_after="5")


class Busy(RequestError):
    """All places are taken."""

    def __init__(self) -> None:
        super().__init__(429, "the queue is full; try again in a second", code="queue_full", retry_after="1")


class EngineStopped(RequestError):
    """The engine's thread has ended by an error. What it was stands in the server's log, not in the answer."""

    def __init__(self) -> None:
        super().__init__(503, "the engine has stopped by an error; the operator must restart it", code="engine_stopped")


class EngineStalled(RequestError):
    """One step of the engine takes far too long; it may still end."""

    def __init__(self) -> None:
        super().__init__(503, "the engine does not get on; try again later", code="engine_stalled", retry_after="30")
