"""A tiny random model of every causal language model class of the installed transformers.

One shrinker for all: fields that configs share by name get the small values of SHRUNK, where the class's own default
config has them. What one model needs beyond that stands in OWN.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kv4.messages import mismatch

VOCAB = 96
PAD = 0
MOST_PARAMETERS = 5_000_000

SHRUNK: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "n_inner": 96,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "num_encoder_attention_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "sliding_window": 24,
    "attention_chunk_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "n_mamba_heads": 2,
    "time_step_rank": 8,
    "rotary_dim": 16,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "init_std": 0.15,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "use_cache": True,
}

_MIXED = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2
# An ellipsis leaves the field to the class.
_LATENT = {"head_dim": ...}

OWN: dict[str, dict[str, Any]] = {
    "AXK1ForCausalLM": _LATENT,
    "BailingHybridForCausalLM": {
        "head_dim": ...,
        "layer_types": _LINEAR,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "num_experts_per_token": 2,
    },
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "CodeGenForCausalLM": {"n_embd": 128, "num_attention_heads": 4, "n_head": ..., "rotary_dim": 16},
    "CohereCompassForCausalLM": {
        "layer_types": _MIXED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(_MIXED)},
    },
    "CpmAntForCausalLM": {"dim_head": 32, "dim_ff": 96, "prompt_length": 8},
    "DbrxForCausalLM": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV3ForCausalLM": _LATENT,
    "Dots3NoteForCausalLM": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 32,
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 48,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 32,
        "swa_qk_rope_head_dim": 16,
        "swa_v_head_dim": 32,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    },
    "FalconForCausalLM": {"head_dim": ..., "num_kv_heads": 1},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "FuyuForCausalLM": {
        "text_config": {
            "model_type": "persimmon",
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
        }
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]], "window_size": 24},
    "Gemma3nForCausalLM": {
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "Gemma4ForCausalLM": {
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "layer_types": _MIXED,
        "head_dim": 32,
        "num_key_value_heads": 1,
    },
    "Gemma4UnifiedForCausalLM": {"layer_types": _MIXED, "head_dim": 32, "num_key_value_heads": 1},
    "GitForCausalLM": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
        }
    },
    "GraniteMoeHybridForCausalLM": {"layer_types": _LINEAR, "shared_intermediate_size": 32},
    "Inkling2ForCausalLM": {
        "unpadded_vocab_size": VOCAB,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 32,
        "sliding_window_size": 24,
        "rel_extent": 128,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    },
    "InklingForCausalLM": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1,
        "swa_head_dim": 32,
        "sliding_window_size": 24,
        "rel_extent": 128,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    },
    "JambaForCausalLM": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "KimiLinearForCausalLM": {
        "head_dim": ...,
        "layer_types": _LINEAR,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "num_experts_per_token": 2,
    },
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "LongcatFlashForCausalLM": {"head_dim": 16},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    "MusicgenForCausalLM": {"num_codebooks": 1},
    "MusicgenMelodyForCausalLM": {"num_codebooks": 1},
    "NemotronForCausalLM": {"num_key_value_heads": 1},
    "Phi4MultimodalForCausalLM": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
            "image_token_id": 90,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "audio_token_id": 91,
        },
    },
    "ProphetNetForCausalLM": {"num_hidden_layers": ...},
    "Qwen4ExpForCausalLM": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 101,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 512,
        "indexer_compress_ratio": 4,
    },
    "ReformerModelWithLMHead": {"axial_pos_embds": False, "attention_head_size": 32, "feed_forward_size": 96},
    "RoCBertForCausalLM": {
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
        "shape_vocab_size": VOCAB,
        "pronunciation_vocab_size": VOCAB,
    },
    "XLNetLMHeadModel": {"max_position_embeddings": ..., "d_head": 32, "d_inner": 96},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "YoutuForCausalLM": _LATENT,
    "Zamba2ForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "head_dim": ...,
        "attention_hidden_size": 128,
        "attention_head_dim": 64,
        "mamba_headdim": 64,
        "mamba_d_state": 16,
        "num_query_groups": 2,
        "kv_channels": 32,
        "adapter_rank": 8,
        "use_mamba_kernels": False,
        "chunk_size": 16,
    },
    "ZayaForCausalLM": {
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
    "xLSTMForCausalLM": {"v_head_dim": ..., "num_blocks": 2, "num_heads": 2, "embedding_dim": 64, "qk_dim_factor": 1.0},
}


def names() -> list[str]:
    """The classes that answer for text alone, each once."""
    every = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return sorted(name for name in every if not name.endswith("ForConditionalGeneration"))


def shrunk(config_class: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    # The config itself does not say what may differ from layer to layer.
    varied = getattr(default, "per_layer_attributes", None) or ()
    settings = {name: value for name, value in SHRUNK.items() if name not in varied and hasattr(default, name)}
    kv_heads = None if "num_key_value_heads" in varied else getattr(default, "num_key_value_heads", None)
    if isinstance(kv_heads, int):
        settings["num_key_value_heads"] = 2 if kv_heads == getattr(default, "num_attention_heads", 0) else 1
    return config_class(**{name: value for name, value in {**settings, **own}.items() if value is not ...})


def build(name: str) -> PreTrainedModel:
    """A random model in eval mode under eager attention. Errors: ValueError for one that has stayed large; what its
    class raises."""
    model_class = getattr(transformers, name)
    config = shrunk(model_class.config_class, OWN.get(name, {}))
    with torch.device("meta"):
        size = sum(x.numel() for x in model_class._from_config(config, attn_implementation="eager").parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(mismatch("name", f"a model of at most {MOST_PARAMETERS} parameters", f"{name} with {size}"))
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    model.generation_config.do_sample = False
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model
