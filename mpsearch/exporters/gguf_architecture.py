"""Models of Hugging Face transformers as llama.cpp has them: names of tensors, their own order of rows, hyperparameters.

Names are those of `gguf.TensorNameMap`. What else differs is by llama.cpp's converter (`conversion/base.py`, `llama.py`,
`qwen.py`, `gemma.py`, `phi.py`, `gpt2.py`): its Llama rotates adjacent pairs of features, so that the rows of q and k are
permuted; Gemma's norms are stored plus one; scaled rotary positions have tensors of their own.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError

# `config.model_type` of transformers -> the architecture of llama.cpp.
FAMILIES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gpt2": "gpt2"},
    **{"gemma2": "gemma2", "gemma3_text": "gemma3"},
}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp holds the model; raises `InputError` for one that it, or this package, does not know.

    Attributes
    ----------
    name
        llama.cpp's, as in "llama".
    config
        The configuration of transformers.
    """

    name: str
    config: Any
    names: Any

    @classmethod
    def from_model(cls, model: nn.Module) -> Architecture:
        """That of a model of transformers."""
        config: Any = getattr(model, "config", None)
        kind = str(getattr(config, "model_type", ""))
        if not isinstance(getattr(model, "lm_head", None), nn.Linear) or kind not in FAMILIES:
            got = f"{type(model).__name__} ({kind})" if kind else type(model).__name__
            raise InputError(
                f"exporter=gguf writes causal language models of transformers of the types {', '.join(FAMILIES)}; got a {got}. "
                "Search with model=hf model.path=FOLDER of such a model, or with another runtime."
            )
        gguf = import_gguf()
        name = FAMILIES[kind]
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
        _check_config(name, config)
        return cls(name, config, gguf.get_tensor_name_map(arch, config.num_hidden_layers))

    def tensor_name(self, parameter: str) -> str:
        """The name in the file of a parameter, as in "blk.0.attn_q.weight"; `InputError` where there is none."""
        name: str | None = self.names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(
                f"The parameter '{parameter}' has no name in llama.cpp's architecture '{self.name}' (gguf.TensorNameMap), so "
                "that no GGUF file can hold this model. Use exporter=native."
            )
        return name

    def row_order(self, parameter: str, n_rows: int) -> Tensor | None:
        """Which row of ours each row in the file is, int64 `[n_rows]`; `None`: they have our order."""
        if self.name != "llama" or (".q_proj." not in parameter and ".k_proj." not in parameter):
            return None
        heads = self.config.num_attention_heads if ".q_proj." in parameter else self.config.num_key_value_heads
        return torch.arange(n_rows).view(heads, 2, -1).transpose(1, 2).flatten()

    def to_file(self, parameter: str, values: Tensor) -> Tensor:
        """The values of a parameter in float32, as the file has them."""
        order = self.row_order(parameter, len(values))
        return (values if order is None else values[order]) + self._shift(parameter)

    def from_file(self, parameter: str, values: Tensor) -> Tensor:
        """The inverse of `to_file`."""
        order = self.row_order(parameter, len(values))
        return (values if order is None else values[order.argsort()]) - self._shift(parameter)

    def _shift(self, parameter: str) -> float:
        return 1.0 if self.name.startswith("gemma") and parameter.endswith("norm.weight") else 0.0

    def extra_tensors(self) -> dict[str, Tensor]:
        """Factors of scaled rotary positions, float32 `[head size / 2]`, by their names in the file."""
        rope = self._rope
        if rope.get("rope_type") == "llama3":
            return {"rope_freqs.weight": _llama3_factors(rope, self.head_size)}
        if rope.get("rope_type") == "longrope":
            return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
        return {}

    @property
    def head_size(self) -> int:
        """Features of an attention head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def _rope(self) -> dict[str, Any]:
        """Parameters of the rotary positions, of layers that attend to all positions."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        return rope.get("full_attention", rope)

    def add_hyperparameters(self, writer: Any) -> None:
        """Write the keys `<architecture>.*` to a `gguf.GGUFWriter`."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_head_count(config.num_attention_heads)
        if self.name == "gpt2":
            writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
            return
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_rope_dimension_count(int(self.head_size * self._rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_freq_base(self._rope["rope_theta"])
        self._add_scaling(writer)
        if self.name in ("gemma2", "gemma3", "phi3"):
            writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
        if self.name == "gemma3":
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(config, key, None):
                getattr(writer, f"add_{key}")(getattr(config, key))

    def _add_scaling(self, writer: Any) -> None:
        import gguf

        rope = self._rope
        kind = rope.get("rope_type", "default")
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif kind == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        elif kind == "longrope":
            original = rope["original_max_position_embeddings"]
            scale = self.config.max_position_embeddings / original
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


def _check_config(name: str, config: Any) -> None:
    """Raise `InputError` for settings of transformers that llama.cpp computes otherwise."""
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = rope.get("full_attention", rope).get("rope_type", "default")
    known = {"default", "linear", "yarn", "longrope" if name == "phi3" else "llama3"}
    if scaling not in known:
        raise InputError(f"exporter=gguf writes rotary positions of the types {', '.join(sorted(known))}; got {scaling}.")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and scalar != config.head_dim:
        raise InputError(
            f"llama.cpp scales the attention of {name} by its head size, {config.head_dim}; got query_pre_attn_scalar={scalar}. "
            "Use exporter=native."
        )


def _llama3_factors(rope: dict[str, Any], head_size: int) -> Tensor:
    """What divides each frequency: 1 for short wavelengths, `factor` for long ones, between them interpolated."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def import_gguf() -> Any:
    """The package gguf; `InputError` with what to install where it is missing."""
    try:
        import gguf
    except ImportError:
        raise InputError("exporter=gguf needs the package gguf: pip install 'mpsearch[gguf]'.") from None
    logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of templates for pairs of texts, which no file has
    return gguf
