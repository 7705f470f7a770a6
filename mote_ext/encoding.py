"""From text to token ids: adds the markers to a tokenizer, and encodes what people typed so that no piece of it ever
becomes a control token.

A marker inside a user's message would switch experts, and <|im_end|> would end their turn. Stripping is no answer:
"<|ana<|analysis|>lysis|>" survives one pass. Typed text is encoded as text instead, whatever it says, and nothing is
lost.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from itertools import pairwise

import torch

from mote_ext.stages import StageTable

Messages = Sequence[dict[str, str]]
_IS_CONTENT = re.compile(r"message(\[['\"]content['\"]\]|\.content)")
_CONTENT = re.compile(
    r"\{\{-?((?:(?!\}\}).)*message(?:\[['\"]content['\"]\]|\.content)(?:(?!\}\}).)*?)-?\}\}", re.DOTALL
)
_BLANKS = "\n\t\n\t"


def set_up_tokenizer(tokenizer, table: StageTable) -> list[int]:
    """Adds the table's markers as special tokens, in place; what is there already stays, the chat template too.

    returns: the marker ids in the order of table.markers. Calling it again changes nothing.
    """
    from tokenizers import AddedToken

    present = tokenizer.get_added_vocab()
    missing = [marker for marker in table.markers if marker not in present]
    tokens = [AddedToken(marker, special=True, normalized=False) for marker in missing]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(table.markers)
    if len(set(ids)) != len(ids) or None in ids:
        raise ValueError(f"set_up_tokenizer: the markers {table.markers} must become different tokens, got ids {ids}")
    if table.marker_ids not in (None, tuple(ids)):
        raise ValueError(
            f"set_up_tokenizer: the model's markers have ids {list(table.marker_ids)}, this tokenizer's {ids}; take "
            "the tokenizer that was saved with the model"
        )
    return ids


def encode_prompt(tokenizer, prompt: str | Messages, *, system: str | None = None) -> list[int]:
    """Token ids that ask the model to answer: the chat template's where the tokenizer has one, else the text itself.

    prompt: a user's message, or messages [{"role": …, "content": …}, …]; every content, of whatever role, is plain text
    system: content of a system message before them
    returns: what apply_chat_template(…, add_generation_prompt=True) gives, unless a content spells a special token
    ValueError: messages without a chat template or that it refuses, a content that is not text, a control token in
    another field.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise ValueError(
                f"encode_prompt: each message needs a text as content, got {type(message.get('content')).__name__}"
            )
        _refuse_controls(tokenizer, {key: value for key, value in message.items() if key != "content"})
    if getattr(tokenizer, "chat_template", None):
        return _encode_chat(tokenizer, messages)
    if len(messages) != 1:
        raise ValueError("encode_prompt: this tokenizer has no chat template, so it takes one text, not messages")
    return _without_controls(tokenizer, messages[0]["content"], add_special_tokens=True)


def encode_prompts(tokenizer, prompts: Sequence[str | Messages], *, system: str | None = None) -> dict:
    """A batch of encode_prompt as {"input_ids": [B, T], "attention_mask": [B, T]}, padded on the left for generate."""
    if not prompts:
        raise ValueError("encode_prompts: at least one prompt is needed, got none")
    rows = [encode_prompt(tokenizer, prompt, system=system) for prompt in prompts]
    return padded_on_left(rows, pad_id_of(tokenizer))


def padded_on_left(rows: Sequence[Sequence[int]], pad_id: int, device=None) -> dict[str, torch.Tensor]:
    """{"input_ids", "attention_mask"} [B, T] int64 of rows of token ids, as generate takes them."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device=device),
    }


def pad_id_of(tokenizer) -> int:
    """What fills up rows: the padding token, else EOS, else 0; attention_mask says where it is."""
    return next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)


def mark_generation(tokenizer) -> None:
    """Puts {% generation %} around what an assistant writes in the tokenizer's chat template, in place: its content and
    what ends it. Losses on assistant tokens alone (return_assistant_tokens_mask, TRL's assistant_only_loss) need that.

    What the template renders stays the same. A template that has the tags is left alone.
    ValueError: no template, or one that does not write messages as {{ … + message['content'] + … }}.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    if "{% generation %}" in template:
        return
    marked = _CONTENT.sub(_mark_assistant, template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = tokenizer.apply_chat_template(messages, tokenize=False) if template else None
    tokenizer.chat_template = marked
    if marked == template or tokenizer.apply_chat_template(messages, tokenize=False) != before:
        tokenizer.chat_template = template or None
        raise ValueError(
            "mark_generation: this chat template does not write messages as {{ … + message['content'] + … }}; put "
            "{% generation %} and {% endgeneration %} around the assistant's content by hand"
        )


def _mark_assistant(found: re.Match) -> str:
    """One output block, split for the assistant before its content and behind what follows that."""
    terms = re.split(r"\s*\+\s*(?=(?:[^']*'[^']*')*[^']*$)", found[1].strip())  # at every + outside of quotes
    place = next(i for i, term in enumerate(terms) if _IS_CONTENT.search(term))
    begin, content, rest = terms[:place], terms[place : place + 2], terms[place + 2 :]

    def output(parts: list[str]) -> str:
        return "{{ " + " + ".join(parts) + " }}" if parts else ""

    assistant = output(begin) + "{% generation %}" + output(content) + "{% endgeneration %}" + output(rest)
    return "{% if message['role'] == 'assistant' %}" + assistant + "{% else %}" + found[0] + "{% endif %}"


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text in which nothing is a control token, without a beginning- or end-of-sequence token."""
    return _without_controls(tokenizer, text, add_special_tokens=False)


def _without_controls(tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """split_special_tokens splits what a tokenizer calls special; other added tokens (<think>, a marker that was in the
    vocabulary before) are split here, by encoding the text in pieces that begin behind their first character.

    ValueError: a tokenizer that makes a control token of a piece all the same.
    """

    def encoded(piece: str, begins: bool) -> list[int]:
        options = {"add_special_tokens": begins and add_special_tokens, "split_special_tokens": True}
        return tokenizer(piece, **options)["input_ids"]

    plain = {str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special}
    plain &= _controls(tokenizer)
    pieces = _cut(text, plain)
    ids = [token for number, piece in enumerate(pieces) for token in encoded(piece, begins=number == 0)]
    made = set(tokenizer.convert_tokens_to_ids(sorted(plain))) & set(ids) if len(pieces) > 1 else set()
    if made:
        raise ValueError(f"encode_text: this tokenizer makes the control tokens {sorted(made)} of typed text")
    return ids


def _cut(text: str, controls: set[str]) -> list[str]:
    """The text in pieces none of which holds a control."""
    found = [control for control in controls if control in text]
    if not found:
        return [text]
    places = sorted(
        {place.start() + 1 for control in found for place in re.finditer(f"(?={re.escape(control)})", text)}
    )
    return [text[begin:end] for begin, end in pairwise([0, *places, len(text)])]


def _refuse_controls(tokenizer, fields: dict) -> None:
    """ValueError: a role, a tool call or any other field beside the content spells a control token."""
    spelled = json.dumps(fields, ensure_ascii=False, default=str)
    found = [control for control in _controls(tokenizer) if control in spelled]
    if found:
        raise ValueError(
            f"encode_prompt: only a message's content may spell control tokens, got {found} in the fields "
            f"{sorted(map(str, fields))}"
        )


def _controls(tokenizer) -> set[str]:
    """Every special and added token but runs of blanks, which some vocabularies have for code."""
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return {token for token in tokens if len(token.strip()) > 1}


def _encode_chat(tokenizer, messages: list[dict]) -> list[int]:
    controls = _controls(tokenizer)
    if any(control in message["content"] for message in messages for control in controls):
        return _encode_apart(tokenizer, messages)
    text = _rendered(tokenizer, messages)
    # A template may put two contents side by side, or one beside a text of its own, which spell one together.
    own = _rendered(tokenizer, [{**message, "content": "x"} for message in messages])
    if any(text.count(control) != own.count(control) for control in controls):
        return _encode_apart(tokenizer, messages)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _rendered(tokenizer, messages: list[dict]) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"encode_prompt: the chat template refuses these messages: {error}") from error


def _encode_apart(tokenizer, messages: list[dict]) -> list[int]:
    """The template around stand-ins is encoded with its control tokens, each content by itself without any."""
    nonce = secrets.token_hex(16)
    # A template that trims its contents trims these blanks, which no template writes itself.
    stand_ins = [{**m, "content": f"{_BLANKS}{nonce}x{i}x{_BLANKS}"} for i, m in enumerate(messages)]
    text = _rendered(tokenizer, stand_ins)
    pieces = re.split(f"({_BLANKS})?{nonce}x([0-9]+)x({_BLANKS})?", text)
    if any(nonce[:8] in piece.lower() or "\\n\\t" in piece for piece in pieces[::4]):
        raise ValueError(
            "encode_prompt: this chat template changes the contents of messages, so one that spells control tokens "
            "cannot be put through it"
        )
    ids: list[int] = tokenizer(pieces[0], add_special_tokens=False)["input_ids"]
    for before, number, after, template in zip(*(pieces[i::4] for i in (1, 2, 3, 4))):
        content = messages[int(number)]["content"]
        content = content if before else content.lstrip()
        ids += encode_text(tokenizer, content if after else content.rstrip())
        ids += tokenizer(template, add_special_tokens=False)["input_ids"]
    return ids
