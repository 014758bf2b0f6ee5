"""Tiny random models of transformers' families, with inputs as their tokenizers and processors give them."""

import torch

VOCABULARY = 260
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT = {key: value for key, value in DENSE.items() if key != "num_key_value_heads"}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {**BERT, "ffn_dim": 128, "word_embed_proj_dim": 64}
MOE = {"num_experts_per_tok": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
WHISPER = {
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4))},
    **{"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "d_model": 64, "num_mel_bins": 16, "max_source_positions": 20},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}

# name -> (model class, configuration class, its arguments, kind of inputs)
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DENSE, "text"),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**DENSE, "tie_word_embeddings": True}, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DENSE, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DENSE, "head_dim": 16}, "text"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DENSE, "head_dim": 16}, "text"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DENSE, "head_dim": 16}, "text"),
    "phi": ("PhiForCausalLM", "PhiConfig", {**DENSE, "num_key_value_heads": 4}, "text"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DENSE, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", DENSE, "text"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "text"),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT, "text"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DENSE, **MOE, "num_local_experts": 4}, "text"),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**DENSE, **MOE, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        "text",
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**DENSE, **MOE, "num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
        "text",
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**DENSE, **MOE, "num_local_experts": 4, "head_dim": 16}, "text"),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**DENSE, "state_size": 8}, "text"),
    "bert": ("BertForSequenceClassification", "BertConfig", BERT, "padded"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", BERT, "padded"),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**BERT, "num_hidden_layers": 3, "cls_token_id": 1, "sep_token_id": 2},
        "padded",
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}, "text_to_text"),
    "vit": ("ViTForImageClassification", "ViTConfig", {**VISION, "patch_size": 8}, "image"),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        "image",
    ),
    "clip": (
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": {**VISION, "patch_size": 8}, "text_config": {**BERT, "num_attention_heads": 4}},
        "image",
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "speech"),
}
MOES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


def tiny(transformers, family):
    """A model of the family with random weights, in eval mode."""
    model, config, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()


def batch(family, n=4, seed=0):
    """Keyword inputs of `n` samples."""
    random = torch.Generator().manual_seed(seed)
    kind = FAMILIES[family][3]
    ids = torch.randint(3, VOCABULARY, (n, 12), generator=random)
    if kind == "image":
        return {"pixel_values": torch.randn(n, 3, 32, 32, generator=random)}
    if kind == "speech":
        return {"decoder_input_ids": ids[:, :5], "input_features": torch.randn(n, 16, 40, generator=random)}
    if kind == "text_to_text":
        return {"decoder_input_ids": ids[:, :5], "input_ids": ids}
    if kind == "padded":
        mask = (torch.arange(12) < torch.randint(5, 13, (n, 1), generator=random)).long()
        return {"input_ids": ids * mask, "attention_mask": mask}
    return {"input_ids": ids}
