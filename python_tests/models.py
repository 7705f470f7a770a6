"""Tiny models and a tiny tokenizer: architectures with random weights, wrapped both ways, their experts not zero."""

import copy

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mote_ext

VOCABULARY = 60
MARKER_IDS = list(range(VOCABULARY, VOCABULARY + 8))
STARTS, ENDS = MARKER_IDS[::2], MARKER_IDS[1::2]
SAFE, UNSAFE = 5, 6
REFUSAL = [7, 8, 9]
PAD = 0
KINDS = ("whole", "in_place")
HEADS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
WIDE = {**HEADS, "intermediate_size": 64, "num_key_value_heads": 2}
OWN = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
ARCHITECTURES = {
    "llama": ("LlamaConfig", WIDE),
    "llama_tied": ("LlamaConfig", {**WIDE, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**WIDE, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", WIDE),
    "qwen3": ("Qwen3Config", {**WIDE, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**WIDE, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**WIDE, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**WIDE, "head_dim": 8, "sliding_window": 8}),
    "phi": ("PhiConfig", WIDE),
    "phi3_fused_qkv": ("Phi3Config", WIDE),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "opt": ("OPTConfig", {**HEADS, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    "gpt_neox_fused_qkv": ("GPTNeoXConfig", {**HEADS, "intermediate_size": 64}),
    "cohere": ("CohereConfig", WIDE),
    "granite": ("GraniteConfig", {**WIDE, "logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
# Where a processor multiplies bfloat16, bitsandbytes packs 4-bit weights anew, and takes whole blocks of 64 x 32 alone.
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}
FOUR = ("llama_tied", "mistral", "gpt2", "gpt_neox_fused_qkv")  # tied; sliding window; Conv1D; untied and fused


def make_base(name="llama", seed=0, **changes):
    """A fresh causal language model of this architecture, in eval mode; the same seed gives the same weights."""
    config_class, options = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**OWN, **options, **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def make_config(**changes):
    return mote_ext.MoTEConfig(
        **{"r": 4, "marker_ids": MARKER_IDS, "verdict_ids": [SAFE, UNSAFE], "refusal_ids": REFUSAL, **changes}
    )


def make_model(name="llama", kind="whole", base=None, seed=0, zero=False, tokenizer=None, **changes):
    """A MoTE model in eval mode; unless `zero` its experts and markers are far from where training would start."""
    base = make_base(name) if base is None else base
    wrap = mote_ext.MoTEForCausalLM.from_base if kind == "whole" else mote_ext.get_mote_model
    model = wrap(base, make_config(**changes), tokenizer=tokenizer).eval()
    return model if zero else disturb(model, seed)


def disturb(model, seed=0):
    """Every trained tensor random, so that a token routed to another expert shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = 0.05 if name.endswith("lora_B") else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def twin(model):
    return copy.deepcopy(model)


def make_prompts(rows=2, length=9, seed=0, padded=True):
    """{"input_ids", "attention_mask"}; with `padded` the first row begins with three pads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
        ids[0, :3] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def chain(*stages, length=3, seed=0):
    """Token ids of stages one after the other, each with its markers and `length` tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for stage in stages:
        text = torch.randint(10, VOCABULARY, (length,), generator=generator).tolist()
        ids += [STARTS[stage], *text, ENDS[stage]]
    return ids


def positions_of(mask):
    """position_ids as generate makes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template=CHAT):
    """A byte-level tokenizer whose every byte is a token, with ChatML's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = chat_template
    return wrapped
