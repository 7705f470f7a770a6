"""MoTELinear: any linear layer plus its experts, a drop-in that holds the layer it was given.

    y[t] = base(x[t]) + Σ_e scales[e] · B[e] A[e] x[t]        over the experts e of token t

A plain nn.Linear goes through the fused op (delta first, the base product accumulated onto it); every other base, such
as a quantised one or GPT-2's Conv1D, is called as it is and the delta added. Source: MoTE, arXiv 2405.00557, sec. 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mote_ext import ops
from mote_ext.context import StageContext


class MoTELinear(nn.Module):
    """base_layer with S stage experts and, by default, a shared one.

    base_layer:   nn.Linear, transformers' Conv1D, or a module of their kind (in_features and out_features):
                  bitsandbytes, torchao, … It is kept, never copied; its parameters are frozen unless the caller says
                  otherwise.
    num_stages:   S, 0..64
    r:            rank of every expert, 1..256
    lora_alpha, use_rslora: scale alpha / r, or alpha / sqrt(r)
    mix:          weight of the stage's expert, 1 - mix the shared one's; without a shared expert the weight is 1
    lora_dropout: on what the experts read, in training
    context:      where the stage ids come from when forward is not given them; a MoTE model sets its own

    lora_A [E, r, K], lora_B [E, N, r]: float32 parameters, E = S + 1 with the shared expert last. A is Kaiming-uniform
    a slice, B zero, so a new layer computes exactly what base_layer does.
    TypeError: base_layer is not linear-like. ValueError: S, r, mix or dropout out of range.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_stages: int = 4,
        r: int = 16,
        lora_alpha: float = 32.0,
        *,
        shared_expert: bool = True,
        mix: float = 0.5,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        context: StageContext | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_sizes(base_layer)
        if not 0 <= num_stages <= 64 or num_stages + shared_expert == 0:
            raise ValueError(f"MoTELinear: num_stages must be in 0..64, with one expert at least, got {num_stages}")
        if not 1 <= r <= 256:
            raise ValueError(f"MoTELinear: r must be in 1..256, got {r}")
        if not (0 <= mix <= 1 and 0 <= lora_dropout < 1):
            raise ValueError(
                f"MoTELinear: mix must be in 0..1 and lora_dropout in [0, 1), got {mix} and {lora_dropout}"
            )
        self.base_layer = base_layer
        self.num_stages, self.r, self.lora_alpha, self.mix = num_stages, r, lora_alpha, mix
        self.shared_expert, self.use_rslora = shared_expert, use_rslora
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.context = context
        for parameter in base_layer.parameters():
            parameter.requires_grad_(False)

        device = next(base_layer.parameters()).device
        num_experts = num_stages + shared_expert
        self.lora_A = nn.Parameter(torch.empty(num_experts, r, self.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(num_experts, self.out_features, r, dtype=torch.float32, device=device))
        # NOTE: not a buffer. `.to(bfloat16)` would round it (32/24 becomes 1.3359), and what is computed in __init__ on
        # the meta device comes back from from_pretrained as zeros.
        self._scales: Tensor | None = None
        self.base_changed()
        if device.type != "meta":
            self.reset_experts()
            self.scales  # noqa: B018  (made now, or torch.compile would compile the first call apart)

    def base_changed(self) -> None:
        """To be called where base_layer became another class (sharding does that): its forward is then called."""
        self._is_plain = type(self.base_layer) is nn.Linear

    @torch.no_grad()
    def reset_experts(self) -> None:
        """A Kaiming-uniform as PEFT's, each expert by itself; B zero."""
        bound = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=√5) of a [r, K] matrix
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def expert_scales(self) -> list[float]:
        """The scale of each expert: mixing weight · alpha / r."""
        scale = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        stage = self.mix if self.shared_expert else 1.0
        return [stage * scale] * self.num_stages + [(1 - self.mix) * scale] * self.shared_expert

    @property
    def scales(self) -> Tensor:
        """expert_scales() as float32 [E] on the experts' device."""
        device = self._parameters["lora_A"].device
        if self._scales is None or self._scales.device != device:
            self._scales = torch.tensor(self.expert_scales(), dtype=torch.float32, device=device)
        return self._scales

    def forward(self, x: Tensor, stage_ids: Tensor | None = None) -> Tensor:
        """x [..., K], stage_ids x.shape[:-1] or those of the model's forward -> [..., N]. Errors: mote_linear's."""
        context = self.context
        if context is not None and not context.experts_enabled:
            return self._run_base(x)
        if stage_ids is None:
            if context is None:
                raise ValueError("MoTELinear: stage_ids is required outside of a MoTE model, got None")
            stage_ids = context.stage_ids
            if stage_ids is None or stage_ids.shape != x.shape[:-1]:
                stage_ids = context.ids_for(x)
        # NOTE: nn.Module looks parameters up in Python, a microsecond each; decoding has 210 layers of 50 µs.
        own, base = self._parameters, self._modules["base_layer"]
        lora_A, lora_B, scales, shared = own["lora_A"], own["lora_B"], self._scales, self.shared_expert
        if scales is None or scales.device != lora_A.device:
            scales = self.scales
        drops = self.training and self.lora_dropout.p > 0
        # Offloading, for one, replaces a forward. NOTE: torch.compile guards on this expression, not on __dict__.
        is_own = getattr(base.forward, "__func__", None) is nn.Linear.forward
        if self._is_plain and not drops and is_own:
            weight = base._parameters["weight"]
            if type(weight) is nn.Parameter:  # a subclass (torchao, DTensor) has a product of its own
                bias = base._parameters["bias"]
                return ops.mote_linear(x, weight, bias, lora_A, lora_B, stage_ids, scales, shared=shared)
        experts = (lora_A, lora_B, stage_ids, scales)
        if drops:
            return self._run_base(x) + ops.lora_delta(self.lora_dropout(x), *experts, shared=shared)
        y = self._run_base(x)
        if torch.is_grad_enabled():
            return ops.lora_add(y, x.to(y.dtype), *experts, shared=shared)
        return ops.lora_add_(y, x.to(y.dtype), *experts, shared=shared)

    def _run_base(self, x: Tensor) -> Tensor:
        base = self._modules["base_layer"]
        if base.__dict__.get("support_avx512bf16_for_cpu"):  # not in __init__: a checkpoint is quantised after it
            keep_unpacked(base)
        return base(x)

    def extra_repr(self) -> str:
        shared = ", shared expert" if self.shared_expert else ""
        return f"{self.in_features} -> {self.out_features}, {self.num_stages} stages{shared}, r={self.r}"


def keep_unpacked(module: nn.Module) -> None:
    """Keeps bitsandbytes from packing the 4-bit weights of a module and of what is in it.

    It packs them where a processor multiplies bfloat16, when they first run in eval mode, and drops the gradient of x
    from then on without an error. A weight that is packed already is unpacked, which restores it to rounding alone.
    """
    for base in module.modules():
        if not base.__dict__.get("support_avx512bf16_for_cpu"):
            continue
        base.support_avx512bf16_for_cpu = False
        state = getattr(base.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            base.weight.data, base.weight.quant_state = unpacked(base.weight.data, state)


def is_linear(module: nn.Module) -> bool:
    """Whether MoTELinear can stand around this module."""
    return linear_sizes(module, required=False) is not None


def linear_sizes(module: nn.Module, required: bool = True) -> tuple[int, int] | None:
    """(in, out) features of a linear-like module. TypeError, or None unless `required`: it is not one."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' transposed linear
        return module.weight.shape[0], module.nf
    if required:
        raise TypeError(
            "MoTELinear: base_layer must be linear (in_features and out_features, or Conv1D), got "
            f"{type(module).__name__}"
        )
    return None
