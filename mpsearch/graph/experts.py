"""Mixture-of-experts blocks whose experts are stored in tensors of three dimensions, rewritten to an `nn.Linear` each.

Hugging Face transformers keeps `gate_up_proj` `[experts, 2 * intermediate, hidden]` and `down_proj` `[experts, hidden,
intermediate]` of a block in one module (some architectures transposed, or with biases). The router stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SplitExperts(nn.Module):
    """Experts `0`, `1`, … as submodules, each with `gate_up_proj` (`up_proj` where there is no gate) and `down_proj`.

    Every expert is called, also with no token, so that the layers of a block do not depend on where a batch was routed.
    """

    num_experts: int
    first_name: str
    has_gate: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Parameters
        ----------
        hidden_states
            `[tokens, hidden]`.
        top_k_index, top_k_weights
            `[tokens, top_k]`: the experts of each token and their weights.
        """
        output = torch.zeros_like(hidden_states)
        for i in range(self.num_experts):
            expert: Any = getattr(self, str(i))
            token, rank = torch.where(top_k_index == i)
            inner = getattr(expert, self.first_name)(hidden_states[token])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)  # type: ignore[operator]
            output = output.index_add(0, token, expert.down_proj(inner) * top_k_weights[token, rank, None])
        return output


def split_experts(module: Any) -> None:
    """Rewrite a module for which `holds_experts` is true, in place; the weights stay on the same memory unless transposed."""
    names = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in module._parameters]
    experts = []
    for i in range(module.num_experts):
        expert = nn.Module()
        for name in names:
            weight = module._parameters[name]
            matrix = weight.detach()[i].t().contiguous() if module.is_transposed else weight.detach()[i]
            bias = module._parameters.get(f"{name}_bias")
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach()[i], requires_grad=bias.requires_grad)
            expert.add_module(name, linear)
        experts.append(expert.train(module.training))
    for name in names:
        del module._parameters[name]
        module._parameters.pop(f"{name}_bias", None)
    for i, expert in enumerate(experts):
        module.add_module(str(i), expert)
    module.first_name = names[0]
    module.__class__ = type(f"Split{type(module).__name__}", (SplitExperts, type(module)), {})


def holds_experts(module: Any) -> bool:
    """Whether the module is a block of experts as transformers marks them (`use_experts_implementation`)."""
    marks = ("is_transposed", "has_gate", "has_bias", "num_experts", "_apply_gate")
    if not all(hasattr(module, mark) for mark in marks) or getattr(module, "has_post_expert_norm", False):
        return False
    weights = [module._parameters.get(name) for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")]
    return all(weight is not None and weight.dim() == 3 for weight in weights)
