"""A fingerprint of a base model's weights, so that experts are not put onto another base unnoticed."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 64  # values read of each tensor: milliseconds on any model, and every fine-tuning changes them


@torch.no_grad()
def weights_digest(model: nn.Module) -> str | None:
    """sha256 over name, shape and 64 evenly spaced values of every parameter, rounded to bfloat16 so that the dtype the
    base is loaded in does not matter. None for quantised or absent weights, whose values are not the checkpoint's."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        plain = type(parameter) is nn.Parameter and parameter.dtype.is_floating_point
        if not plain or parameter.device.type == "meta":
            return None
        places = torch.linspace(0, parameter.numel() - 1, min(_SAMPLES, parameter.numel()), dtype=torch.float64)
        flat = parameter.detach().reshape(-1)
        values = flat[places.long().to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name}{list(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()
