"""The README.md that is saved beside a model."""

from __future__ import annotations

from mote_ext.config import MoTEConfig

_CARD = """---
library_name: mote_ext
{base}tags:
- mote
- mixture-of-experts
- lora
- safety
pipeline_tag: text-generation
---

# {kind} of a MoTE model

Mixture of insighTful Experts ([arXiv 2405.00557](https://arxiv.org/abs/2405.00557)): the model answers in stages, each
with its own LoRA expert{shared}; the stage a token belongs to is its route.

| stage | expert | opens with | may be followed by |
|---|---|---|---|
{stages}

Rank {r}, alpha {alpha}, on {targets}; tokens outside of stages: `prompt_expert="{prompt}"`.

```python
import mote_ext
from transformers import AutoTokenizer

model = mote_ext.MoTEForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
inputs = mote_ext.encode_prompts(tokenizer, ["How do plants drink?"])
ids = model.generate(**inputs, path="adaptive", max_new_tokens=256)
print(mote_ext.parse_stages(tokenizer, ids[0]))
```
"""


def model_card(config: MoTEConfig, adapter_only: bool) -> str:
    """Markdown with the stage table and how to load it."""
    rows = []
    for i, stage in enumerate(config.stages):
        expert = i if config.assignment == "stage" else config.assignment
        rows.append(f"| {stage['name']} | {expert} | `<|{stage['name']}|>` | {', '.join(stage['next']) or '-'} |")
    if config.shared_expert:
        rows.append(f"| (every stage) | {config.num_stage_experts}, shared | - | - |")
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    base = config.base_model_name_or_path
    return _CARD.format(
        base=f"base_model: {base}\n" if base else "",
        kind="Experts" if adapter_only else "Weights",
        shared=", and one expert sees every token" if config.shared_expert else "",
        stages="\n".join(rows),
        r=config.r,
        alpha=config.lora_alpha,
        targets=targets,
        prompt=config.prompt_expert,
    )
