"""Rewrite modules that multiply by a weight of their own without calling a layer, so that each weight belongs to an `nn.Linear`.

`nn.MultiheadAttention` keeps the q, k and v projections in one parameter, `Conv1D` of Hugging Face transformers keeps its weight
transposed, and in eval mode `nn.TransformerEncoder`, its layers and `nn.MultiheadAttention` run fused operations that read
weights and call no submodule. Layers that are never called cannot be calibrated, get no quantized input, and cannot be replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.graph.experts import holds_experts, split_experts
from mpsearch.graph.fold import uses_of_tensors
from mpsearch.graph.surgery import Undo, snapshot

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class ProjectedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with its input projections as submodules `q_proj`, `k_proj`, `v_proj`; the same results otherwise.

    `in_proj_weight`, `in_proj_bias` and the separate projection weights are `None`, which also keeps
    `nn.TransformerEncoderLayer` from its fused path.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`; nested tensors are not supported."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        extra = [] if self.bias_k is None or self.bias_v is None else [(self.bias_k, self.bias_v)]
        extra += [(k.new_zeros(1, 1, self.embed_dim),) * 2] if self.add_zero_attn else []
        for extra_k, extra_v in extra:
            k, v = (torch.cat([x, more.expand(len(x), 1, -1)], dim=1) for x, more in ((k, extra_k), (v, extra_v)))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(key_padding_mask, attn_mask, len(q), len(extra), q.dtype)
        dropout, weights = (self.dropout if self.training else 0.0), None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(self, padding: Tensor | None, attention: Tensor | None, n: int, n_extra: int, dtype: torch.dtype) -> Tensor | None:
        """The mask added to the scores `[n, heads, queries, keys]`, broadcastable; the last `n_extra` keys are never masked."""
        if attention is not None and attention.dim() == 3:
            attention = attention.reshape(n, self.num_heads, *attention.shape[1:])
        padding = None if padding is None else padding[:, None, None]
        total: Tensor | None = None
        for mask in (attention, padding):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
                total = mask if total is None else total + mask
        return total if total is None or not n_extra else F.pad(total, (0, n_extra))


class PaddedEncoder(nn.TransformerEncoder):
    """`nn.TransformerEncoder` without nested tensors: in eval mode outputs at padded tokens are those of zeros, as with them."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """See `nn.TransformerEncoder.forward`."""
        output: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
        if self.training or src.dim() != 3 or mask is not None or src_key_padding_mask is None:
            return output
        padded = src_key_padding_mask if src_key_padding_mask.dtype == torch.bool else src_key_padding_mask != 0
        if self.mask_check and (padded[:, :-1] & ~padded[:, 1:]).any():  # torch takes the fused path for left-aligned masks only
            return output
        zeros = torch.zeros_like(output)
        return torch.where(padded[..., None], zeros if self.norm is None else self.norm(zeros), output)


def expose_projections(model: nn.Module) -> nn.Module:
    """Rewrite in place so that every projection is a called `nn.Linear`; returns `model`. A second call changes nothing.

    Attention modules get `q_proj`, `k_proj` and `v_proj` in place of `in_proj_weight`; a `Conv1D` becomes an `nn.Linear`; experts
    in one tensor become an `nn.Linear` each; fused paths are switched off. Outputs stay the same up to float rounding. Weights
    that several such modules share stay shared.
    Left as they are: subclasses with a forward of their own, and weights that other modules hold too or that are computed
    (`nn.utils.parametrize`).
    """
    block_fused_paths(model)
    for module in [module for module in model.modules() if holds_experts(module)]:
        split_experts(module)
    uses = uses_of_tensors(model)
    n_names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    modules: list[Any] = [module for module in model.modules() if type(module) is nn.MultiheadAttention or _is_conv1d(module)]
    for module in modules:
        for parameter in _projected(module):
            uses[id(parameter)] -= n_names[module]
    parts: dict[int, list[nn.Parameter]] = {}
    for module in modules:
        if any(uses[id(parameter)] for parameter in _projected(module)):
            continue
        if isinstance(module, nn.MultiheadAttention):
            _project(module, parts)
        else:
            (module.weight,) = _split(parts, module.weight, lambda w: [w.t()])
            module.out_features, module.in_features = module.weight.shape
            module.__class__ = nn.Linear
    return model


def block_fused_paths(model: nn.Module) -> Undo:
    """Make transformer encoders of `model` call their submodules in eval mode too; returns the undo."""
    undo = ExitStack()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            undo.callback(snapshot(module))
            module.activation_relu_or_gelu = 0  # only the fused path reads it
        elif isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            undo.callback(snapshot(module))
            module.use_nested_tensor = False
            if type(module) is nn.TransformerEncoder:
                module.__class__ = PaddedEncoder
    return undo.close


def _project(module: nn.MultiheadAttention, parts: dict[int, list[nn.Parameter]]) -> None:
    """Turn an attention module into a `ProjectedAttention`."""
    whole, bias = (module._parameters.get(name) for name in ("in_proj_weight", "in_proj_bias"))
    separate: Any = [module._parameters.get(f"{name}_weight") for name in PROJECTIONS]
    weights = separate if whole is None else _split(parts, whole, lambda w: w.chunk(3))
    biases: Sequence[nn.Parameter | None] = [None] * 3 if bias is None else _split(parts, bias, lambda b: b.chunk(3))
    for name in ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in PROJECTIONS)):
        module._parameters[name] = None
    module.__class__ = ProjectedAttention
    for name, weight, part in zip(PROJECTIONS, weights, biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=part is not None, device="meta")
        linear.weight = weight
        linear.register_parameter("bias", part)
        linear.train(module.training)
        module.add_module(name, linear)


def _split(parts: dict[int, list[nn.Parameter]], parameter: nn.Parameter, split: Callable[[Tensor], Any]) -> list[nn.Parameter]:
    """New parameters from `split(parameter)`, the same ones for a parameter that `parts` has already."""
    if id(parameter) not in parts:
        tensors = [part.clone(memory_format=torch.contiguous_format) for part in split(parameter.detach())]
        parts[id(parameter)] = [nn.Parameter(part, requires_grad=parameter.requires_grad) for part in tensors]
    return parts[id(parameter)]


def _is_conv1d(module: Any) -> bool:
    """Whether the module is a `Conv1D` as in Hugging Face transformers: x @ weight + bias, weight `[in, out]`."""
    weight = module._parameters.get("weight")
    is_own = type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2
    return is_own and getattr(module, "nf", None) == weight.shape[1]


def _projected(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are replaced."""
    names = ("in_proj_weight", "in_proj_bias") if isinstance(module, nn.MultiheadAttention) else ("weight",)
    return [parameter for name in names if (parameter := module._parameters.get(name)) is not None]
