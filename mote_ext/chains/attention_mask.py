"""The form in which a model's attention takes a mask of one's own, and a trial of whether it follows it.

transformers hands a 4D mask to the layers as it is. Thus the form has to be the attention's own (a bool mask under
eager is added to the scores, silently), the model's sliding window has to be in it (it is not applied again), and
models whose layers differ take one mask for each kind. What no mask of this kind can express is refused by name;
whatever else a model does with it, a short trial finds. Used by block_mask.py; another trial is of packed rows without
such a mask, used by the trainer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mote_ext.compat import attention_implementation
from mote_ext.model import MoTEModel

FULL, SLIDING = "full_attention", "sliding_attention"
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")
ALIBI_MODELS = ("bloom", "mpt")
TRIAL_TEXT = 4  # tokens of each stage in the trial


@dataclass(frozen=True)
class AttentionForm:
    """implementation: "eager", "sdpa" or "flex_attention"
    windows: what the layers see, tokens back or None for all, by kind of layer; one entry where all are of one kind
    dtype:   of an additive mask
    """

    implementation: str
    windows: tuple[tuple[str, int | None], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model) -> AttentionForm:
        """ValueError: an attention to which a mask of one's own cannot be given, with the model's name."""
        backbone = _backbone(model)
        config, name = backbone.config.get_text_config(), type(backbone).__name__
        implementation = attention_implementation(config)
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"step skipping: {name} runs {implementation}, which takes no mask of blocks; load the model with "
                'attn_implementation="sdpa" or "flex_attention", or set p_dropout to 0'
            )
        if config.model_type in ALIBI_MODELS or getattr(config, "alibi", False):
            raise ValueError(
                f"step skipping: {name} builds its ALiBi position biases from the 2D mask, so it takes no mask of "
                "blocks; set p_dropout to 0"
            )
        return cls(implementation, _windows(config, name), _embedding_weight(model).dtype)

    def mask(self, visible: Callable, input_ids: Tensor):
        """What goes into the model as attention_mask: a tensor [B, 1, T, T], a BlockMask, or a dict of them by kind.

        visible: window → function (batch, head, query, key) of index tensors → bool
        """
        masks = {kind: self._one(visible(window), input_ids) for kind, window in self.windows}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _one(self, visible: Callable, input_ids: Tensor):
        (rows, tokens), device = input_ids.shape, input_ids.device
        if self.implementation == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            return create_block_mask(visible, B=rows, H=None, Q_LEN=tokens, KV_LEN=tokens, device=device)
        row, place = torch.arange(rows, device=device)[:, None, None], torch.arange(tokens, device=device)
        mask = visible(row, 0, place[:, None], place)[:, None]
        if self.implementation == "sdpa":
            return mask
        lowest = torch.finfo(self.dtype).min
        return torch.full(mask.shape, lowest, dtype=self.dtype, device=device).masked_fill_(mask, 0)


class MaskProbe:
    """Tries a mask on a model once, before it is relied on."""

    def __init__(self) -> None:
        self._passed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def require(self, model, form: AttentionForm, skipping) -> None:
        """ValueError: with a block hidden the model still sees it, or with none it is not what it is without a mask.

        skipping: the StepSkipping. Three forwards of a few tokens, without dropout, once a model and form.
        """
        if self._passed.get(model) == form:
            return
        hidden, opened = _trial(model, form, skipping)
        if not (hidden and opened):
            said = "sees what the mask hides" if not hidden else "differs from itself under a mask that hides nothing"
            raise ValueError(
                f"step skipping: {type(_backbone(model)).__name__} with {form.implementation} {said}; its layers do "
                "not follow a mask of one's own. Set p_dropout to 0"
            )
        self._passed[model] = form


class PackingProbe:
    """Tries once whether a model, without a mask of one's own, keeps the documents of a packed row apart."""

    def __init__(self) -> None:
        self._passed: weakref.WeakSet = weakref.WeakSet()

    def require(self, model) -> None:
        """ValueError: it does not; some models take no notice of where position_ids begin again.

        model: a MoTE model. Three forwards of a few tokens, without dropout, once a model.
        """
        if model in self._passed:
            return
        if not _keeps_documents_apart(model):
            raise ValueError(
                f"packing: {type(_backbone(model)).__name__} does not separate packed documents: their tokens see the "
                "documents before them. Set packing=False"
            )
        self._passed.add(model)


@torch.no_grad()
def _keeps_documents_apart(model) -> bool:
    """Two documents, alone and in one row behind either of two first ones: are the second one's logits the same?"""
    device = _embedding_weight(model).device
    table = model.routing.table
    ordinary = [token for token in range(3 * TRIAL_TEXT + 2 * len(table)) if token not in table.marker_ids]
    first, other, second = (ordinary[i * TRIAL_TEXT : (i + 1) * TRIAL_TEXT] for i in range(3))
    positions = torch.tensor([[*range(TRIAL_TEXT)] * 2], device=device)

    def logits(ids: list[list[int]], **given) -> Tensor:
        return model(input_ids=torch.tensor(ids, device=device), use_cache=False, **given).logits.float()

    with _evaluated(model):
        one, two = (logits([before + second], position_ids=positions)[0] for before in (first, other))
        alone = logits([second], attention_mask=torch.ones_like(positions[:, :TRIAL_TEXT]))[0]
    effect, size = (one - two)[:TRIAL_TEXT].abs().max(), alone.abs().max()
    one, two = one[TRIAL_TEXT:], two[TRIAL_TEXT:]
    noise = 0.03 * size + 0.1 * effect
    return bool((one - two).abs().max() <= 0.01 * effect) and bool((one - alone).abs().max() <= noise)


@contextmanager
def _evaluated(model) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards as before, the stage ids it noted too."""
    routing = getattr(model, "routing", None)
    newest = None if routing is None else routing.last_stage_ids
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if routing is not None:
            routing.last_stage_ids = newest


@torch.no_grad()
def _trial(model, form: AttentionForm, skipping) -> tuple[bool, bool]:
    """Two chains that differ in an early stage, a later one's logits: is it hidden, and is nothing else changed?"""
    inputs, stage = _trial_chains(skipping.table, *skipping.pairs[0], _embedding_weight(model).device)

    def logits(**given) -> Tensor:
        return model(**{**inputs, **given, "use_cache": False}).logits[:, stage].float()

    with _evaluated(model):
        plain = logits()
        opened = logits(**skipping.masked(model, form, inputs, [[], []]))
        hidden = logits(**skipping.masked(model, form, inputs, [[skipping.pairs[0]]] * 2))
    effect, size = (plain[0] - plain[1]).abs().max(), plain.abs().max()
    noise = 0.03 * size + 0.1 * effect  # other kernels, in bfloat16; what is wrong is wrong by the whole effect
    return (
        bool((hidden[0] - hidden[1]).abs().max() <= 0.01 * effect),
        bool((opened - plain).abs().max() <= noise),
    )


def _trial_chains(table, late: int, early: int, device: torch.device) -> tuple[dict, slice]:
    """{"input_ids", "attention_mask"} of two chains, and where the text of the later stage stands."""
    ordinary = [token for token in range(5 * TRIAL_TEXT + 2 * len(table)) if token not in table.marker_ids]
    question, first, other, text = (ordinary[i * TRIAL_TEXT : (i + 1) * TRIAL_TEXT] for i in range(1, 5))

    def block(stage: int, tokens: list[int]) -> list[int]:
        return [table.start_id(stage), *tokens, table.end_id(stage)]

    ids = torch.tensor([question + block(early, seen) + block(late, text) for seen in (first, other)], device=device)
    end = ids.shape[1] - 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, slice(end - TRIAL_TEXT, end)


def _backbone(model):
    """The base's own backbone, whoever stands around it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    inner = getattr(model, model.base_model_prefix)
    return inner.base if isinstance(inner, MoTEModel) else inner


def _embedding_weight(model) -> Tensor:
    embedding = model.get_input_embeddings()
    return getattr(embedding, "base", embedding).weight  # without the markers' rows


def _windows(config, name: str) -> tuple[tuple[str, int | None], ...]:
    """The kinds of layers and how far each looks back. ValueError: a kind that a mask does not describe."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        if getattr(config, "attention_chunk_size", None) is not None:
            kinds = ["chunked_attention"]
        else:
            kinds = [FULL if window is None else SLIDING]
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise ValueError(
            f"step skipping: {name} has layers of the kind {unknown}, to which a mask of blocks does not apply; only "
            f"{[FULL, SLIDING]} are supported. Set p_dropout to 0"
        )
    return tuple((kind, window if kind == SLIDING else None) for kind in sorted(set(kinds)))
