"""What fields of prompts and chains must be. Reasons name fields, types and lengths, never what a text says."""

from __future__ import annotations

from collections.abc import Sequence


def require_text(name: str, value) -> None:
    """ValueError: not a text, a blank one, or one that cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {kind_of(value)}")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a surrogate pair at character {error.start + 1}") from None


def require_question(prompt, messages: Sequence | None) -> None:
    """ValueError: not exactly one of a text and of messages that end before the answer."""
    if (prompt is None) == (messages is None):
        raise ValueError(f"exactly one of prompt and messages is needed, got {'neither' if prompt is None else 'both'}")
    if prompt is not None:
        return require_text("prompt", prompt)
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {kind_of(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f'messages[{i}] must be {{"role": …, "content": …}}, got {kind_of(message)}')
        for name in ("role", "content"):
            require_text(f"messages[{i}].{name}", message.get(name))
    if messages[-1]["role"] == "assistant":
        raise ValueError("messages must end before the answer, which is the response, not with the assistant's turn")


def kind_of(value) -> str:
    """What a value is, without saying it."""
    if value is None:
        return "nothing"
    size = f" of length {len(value)}" if isinstance(value, (str, list, tuple, dict)) else ""
    return f"{type(value).__name__}{size}"
