"""Reads the fields of a JSON object: absent or null is the default, a wrong type or value an error that names it."""

from __future__ import annotations

import json
from typing import Any

from mote_ext.serving.errors import RequestError


def parse_object(data: bytes) -> dict:
    """A request's body. RequestError 400: no JSON, or no object. The message never repeats the body."""
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of too many digits
        place = f" at character {error.pos}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(400, f"the body is no JSON{place}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise RequestError(400, f"the body must be a JSON object, got {_kind(found)}", code="invalid_json")
    return found


class Fields:
    """The fields of one body. Every method: RequestError 400 naming field, expected and got."""

    def __init__(self, body: dict) -> None:
        self.body = body

    def get(self, name: str) -> Any:
        return self.body.get(name)

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise wrong(name, "true or false", value)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise wrong(name, f"a number from {low} to {high}", value)
        return float(value)

    def whole(self, name: str, low: int, high: int, default: int | None) -> int | None:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, f"a whole number from {low} to {high}", value)
        return value

    def text(self, name: str, default: str, longest: int = 256) -> str:
        value = self.body.get(name)
        return default if value is None else require_text(name, value, longest)

    def texts(self, name: str, most: int, longest: int = 256) -> tuple[str, ...]:
        """One text or a list of some, none of them empty."""
        value = self.body.get(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most or not all(found):
            raise wrong(name, f"a text or a list of at most {most}, none of them empty", value)
        return tuple(require_text(name, item, longest) for item in found)

    def refuse(self, name: str, harmless: tuple, why: str) -> None:
        """What is not offered may be absent, null or one of these values that ask for nothing."""
        value = self.body.get(name)
        if value is not None and not any(value == item and type(value) is type(item) for item in harmless):
            raise RequestError(400, f"{name} is not supported here: {why}", param=name, code="unsupported")


def require_text(name: str, value: Any, longest: int | None = None) -> str:
    """RequestError 400: no text, too long, or with half of a surrogate pair, which no tokenizer reads."""
    if not isinstance(value, str):
        raise wrong(name, "a text", value)
    if longest is not None and len(value) > longest:
        raise RequestError(400, f"{name} must be at most {longest} characters, got {len(value)}", param=name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            400, f"{name} must be Unicode text, got half of a surrogate pair at {error.start}", param=name
        ) from None
    return value


def wrong(name: str, expected: str, value: Any) -> RequestError:
    """The error of a field that is not what it must be."""
    return RequestError(400, f"{name} must be {expected}, got {shown(value)}", param=name, code="invalid_value")


def shown(value: Any) -> str:
    """A value as an error repeats it; of a long one the type alone."""
    if isinstance(value, str) and len(value) <= 40:
        return ascii(value)[:60]
    return (repr(value) if isinstance(value, bool | int | float) or value is None else _kind(value))[:60]


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
