"""Bodies of OpenAI's completions and chat completions become an Ask; what cannot be served is refused with a reason.

A field that would change the answer and is not offered (tools, logit_bias, …) is refused: silence would be a wrong
answer. So is one whose name is nearly one of ours. Other fields are ignored, for clients send many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from mote_ext.encoding import Messages
from mote_ext.engine import SamplingParams
from mote_ext.serving.errors import RequestError
from mote_ext.serving.fields import Fields, require_text, shown, wrong
from mote_ext.serving.policy import CHECKS, Policy

MOST_SAMPLES = 16
MOST_STOPS = 4
MOST_LOGPROBS = 20
MOST_SCORES = 1 << 16  # log-probabilities of one request, about 4 MB of JSON
MOST_FIELDS = 128
_OURS = ("path", "check", "stage_max_tokens", "cache_salt")
_KNOWN = {*_OURS, "max_tokens"}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNOFFERED = {
    "tools": (([],), "this model calls no tools"),
    "functions": (([],), "this model calls no functions"),
    "tool_choice": (("none", "auto"), "this model calls no tools"),
    "function_call": (("none", "auto"), "this model calls no functions"),
    "logit_bias": (({},), "stage rules decide which tokens are possible"),
    "presence_penalty": ((0, 0.0), "use repetition_penalty"),
    "frequency_penalty": ((0, 0.0), "use repetition_penalty"),
    "response_format": (({"type": "text"},), "answers are text"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "suffix": (("",), "text is only continued at its end"),
    "echo": ((False,), "the prompt is not repeated"),
}


@dataclass(frozen=True)
class Ask:
    """One request that may be served.

    prompt: messages of a chat, a text to be continued, or token ids
    path:   the policy's name of params.path
    check:  "none", "flag" or "enforce", the one in force
    shows_reasoning: whether its client may see the reasoning stages, as far as the verdict allows
    waits_for_verdict: whether they are kept back until the answer's verdict
    """

    prompt: Messages | str | list[int]
    params: SamplingParams
    path: str
    check: str
    is_chat: bool
    stream: bool
    include_usage: bool
    shows_reasoning: bool
    waits_for_verdict: bool


def parse_chat(body: dict, policy: Policy, model: str, salt: str = "") -> Ask:
    """A body of /v1/chat/completions. salt: of the client's key. RequestError: what is wrong with it."""
    fields = _checked(body, model)
    messages = _messages(fields)
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS, None)
    if top is not None and not fields.flag("logprobs"):
        raise RequestError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
    logprobs = (top or 0) if fields.flag("logprobs") else None
    limit = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    return _ask(fields, policy, messages, salt, is_chat=True, logprobs=logprobs, limit=limit)


def parse_completion(body: dict, policy: Policy, model: str, salt: str = "") -> Ask:
    """A body of /v1/completions: a text to be continued, or its token ids. RequestError: what is wrong with it."""
    fields = _checked(body, model)
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS, None)
    best_of = fields.whole("best_of", 1, MOST_SAMPLES, None)
    if best_of not in (None, fields.whole("n", 1, MOST_SAMPLES, 1)):
        raise RequestError(400, "best_of must equal n: answers are not ranked", param="best_of")
    return _ask(fields, policy, _prompt(fields), salt, is_chat=False, logprobs=logprobs, limit="max_tokens")


def _checked(body: dict, model: str) -> Fields:
    """The fields, once the model is this one and nothing is asked for that is not offered."""
    fields = Fields(body)
    asked = fields.text("model", model)
    if asked != model:
        raise RequestError(
            404,
            f"there is no model {ascii(asked)} here, this server has {model!r}",
            param="model",
            code="model_not_found",
        )
    for name, (harmless, why) in _UNOFFERED.items():
        fields.refuse(name, harmless, why)
    _refuse_misspelt(body)
    return fields


def _refuse_misspelt(body: dict) -> None:
    """RequestError 400: a field that is nearly one of ours; ignored, it would answer unchecked."""
    if len(body) > MOST_FIELDS:
        raise RequestError(400, f"a body must have at most {MOST_FIELDS} fields, got {len(body)}")
    for name in set(body) - _KNOWN:
        meant = get_close_matches(name[:32].lower(), _OURS, 1, 0.75)
        if meant:
            raise RequestError(400, f"there is no field {shown(name)}; did you mean {meant[0]}?", param=meant[0])


def _ask(fields: Fields, policy: Policy, prompt, salt: str, *, is_chat: bool, logprobs: int | None, limit: str) -> Ask:
    path = policy.path(_asked_path(fields))
    check = policy.check(_asked_check(fields), path)
    max_tokens = fields.whole(limit, 1, policy.max_tokens, policy.default_tokens)
    limits = _stage_limits(fields, policy)
    limits = policy.stage_limits(path, max_tokens, limits, check)
    hides = policy.hides_reasoning(check)
    num_samples = fields.whole("n", 1, MOST_SAMPLES, 1)
    if logprobs is not None and num_samples * max_tokens * (1 + logprobs) > MOST_SCORES:
        raise RequestError(
            400,
            f"log-probabilities: n x max_tokens x (1 + alternatives) must be at most {MOST_SCORES:,}, got "
            f"{num_samples} x {max_tokens} x {1 + logprobs}",
            param="logprobs",
        )
    try:
        params = SamplingParams(
            path=policy.routes[path],
            check=False if check == "none" else check,
            max_new_tokens=max_tokens,
            stage_max_tokens=limits or None,
            hide=policy.reasoning if hides and policy.routes[path] is not None else (),
            temperature=fields.number("temperature", 0, 2, 1.0),
            top_p=_top_p(fields),
            top_k=max(0, fields.whole("top_k", -1, 2**31, 0)),  # -1 is vLLM's word for all
            min_p=fields.number("min_p", 0, 1, 0.0),
            repetition_penalty=fields.number("repetition_penalty", 0.01, 100, 1.0),
            seed=fields.whole("seed", -(2**63), 2**63 - 1, None),
            n=num_samples,
            stop=fields.texts("stop", MOST_STOPS),
            logprobs=logprobs,
            cache_salt=salt,
        )
    except ValueError as error:
        raise RequestError(400, str(error)) from error
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise wrong("stream_options", "an object", options)
    stream = fields.flag("stream")
    usage = stream and Fields(options).flag("include_usage")
    waits = policy.show_reasoning == "safe" and not hides
    return Ask(prompt, params, path, check, is_chat, stream, usage, not hides, waits)


def _asked_path(fields: Fields) -> str | list[str] | None:
    asked = fields.get("path")
    if asked is None or isinstance(asked, str):
        return asked
    if isinstance(asked, list) and asked and all(isinstance(name, str) for name in asked):
        return asked
    raise wrong("path", "a path's name or a list of stage names", asked)


def _asked_check(fields: Fields) -> str:
    asked = fields.get("check")
    if asked is None or isinstance(asked, bool):
        return "flag" if asked else "none"
    if asked not in CHECKS:
        raise wrong("check", f"false or one of {CHECKS}", asked)
    return asked


def _top_p(fields: Fields) -> float:
    top_p = fields.number("top_p", 0, 1, 1.0)
    if top_p == 0:
        raise wrong("top_p", "above 0", top_p)
    return top_p


def _stage_limits(fields: Fields, policy: Policy) -> dict[str, int]:
    limits = fields.get("stage_max_tokens") or {}
    if not isinstance(limits, dict):
        raise wrong("stage_max_tokens", 'an object such as {"analysis": 64}', limits)
    for name in limits:
        if name not in policy.stages:
            raise wrong("stage_max_tokens", f"an object whose keys are among {list(policy.stages)}", name)
    return {name: Fields(limits).whole(name, 1, policy.max_tokens, policy.max_tokens) for name in limits}


def _messages(fields: Fields) -> list[dict[str, str]]:
    found = fields.get("messages")
    if not isinstance(found, list) or not found:
        raise wrong("messages", 'a list such as [{"role": "user", "content": "Hello"}]', found)
    return [_message(f"messages[{number}]", message) for number, message in enumerate(found)]


def _message(name: str, message) -> dict[str, str]:
    if not isinstance(message, dict):
        raise wrong(name, "an object with role and content", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES or message.get("tool_calls"):
        why = "; this model calls no tools" if role in ("tool", "function") or message.get("tool_calls") else ""
        raise RequestError(
            400, f"{name}.role must be one of {list(_ROLES)}{why}, got {ascii(role)[:40]}", param=f"{name}.role"
        )
    return {"role": _ROLES[role], "content": _content(f"{name}.content", message.get("content"))}


def _content(name: str, content) -> str:
    """A text, or OpenAI's list of parts where all are text."""
    if not isinstance(content, list):
        return require_text(name, content)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(
                400,
                f'{name}[{number}] must be {{"type": "text", "text": …}}, got {ascii(kind)[:40]}; images and '
                "sound are not read",
                param=f"{name}[{number}]",
            )
        texts.append(require_text(f"{name}[{number}].text", part.get("text")))
    return "".join(texts)


def _prompt(fields: Fields) -> str | list[int]:
    """A text or token ids; OpenAI's lists of several prompts are taken where there is one in it."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return require_text("prompt", prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return _ids(prompt)
    raise wrong("prompt", "one text or one list of token ids, not empty", prompt)


def _ids(prompt: Sequence[int]) -> list[int]:
    strange = [token for token in prompt if not 0 <= token < 2**31]
    if strange:
        raise wrong("prompt", "token ids from 0 on", strange[0])
    return list(prompt)
