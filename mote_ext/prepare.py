"""Readies a base for experts: completes the configuration from it and its tokenizer, starts the markers."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from mote_ext.config import MoTEConfig
from mote_ext.digest import weights_digest
from mote_ext.encoding import encode_text, set_up_tokenizer
from mote_ext.markers import rows_from_words, rows_without_words


def prepare_config(config: MoTEConfig | None, base: PreTrainedModel, tokenizer) -> MoTEConfig:
    """A copy of config that knows this base: token ids, vocabulary, where it comes from and its digest.

    ValueError: the base has no language-model head, the verdicts are not told apart by one token.
    """
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no language-model head; pass the causal language model")
    config = copy.deepcopy(config) if config is not None else MoTEConfig()
    if tokenizer is not None:
        config.marker_ids = set_up_tokenizer(tokenizer, config.stage_table)
        config.refusal_ids = encode_text(tokenizer, config.refusal)
        config.verdict_ids = _verdict_ids(tokenizer, config.verdicts)
    if config.marker_ids is not None:
        config.set_base(base.config, base.get_input_embeddings().weight.shape[0])
        config.tie_word_embeddings = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    config.base_model_name_or_path = base.name_or_path or config.base_model_name_or_path
    config.base_revision = getattr(base.config, "_commit_hash", None)
    config.base_digest = weights_digest(base)
    config.dtype = base.dtype
    return config


@torch.no_grad()
def start_markers(model: PreTrainedModel, tokenizer) -> None:
    """Gives the marker rows their first values: from the stages' words, or without a tokenizer from spread rows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    words = [text for stage in model.routing.table.stages for text in stage.words]

    def rows(weight):
        return (
            rows_without_words(weight, len(words)) if tokenizer is None else rows_from_words(weight, tokenizer, words)
        )

    embedding.rows.copy_(rows(embedding.base.weight))
    if head.rows is not None:
        head.rows.copy_(rows(head.base.weight))
    if head.marker_bias is not None:
        head.marker_bias.copy_(rows(head.base.bias[:, None])[:, 0])


def _verdict_ids(tokenizer, verdicts: list[str]) -> list[int]:
    """One token for each verdict. What both begin with, such as the blank some tokenizers put first, is left out."""
    safe, unsafe = (encode_text(tokenizer, verdict) for verdict in verdicts)
    while safe and unsafe and safe[0] == unsafe[0]:
        safe, unsafe = safe[1:], unsafe[1:]
    if len(safe) != 1 or len(unsafe) != 1:
        raise ValueError(
            f"MoTEConfig: verdicts must differ in exactly one token of this tokenizer, got {list(verdicts)}, which it "
            f"encodes as {[encode_text(tokenizer, verdict) for verdict in verdicts]}"
        )
    return [safe[0], unsafe[0]]
