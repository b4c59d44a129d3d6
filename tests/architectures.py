"""Tiny models of many architectures: their classes in transformers, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A model class, and what makes a tiny one of it.

    Attributes:
        config: Name of the configuration's class in transformers.
        model: Name of the model's class.
        sizes: Arguments of the configuration. The ids of special tokens join those that the
            class takes: at the top, or in ``text_config`` where there is one.
        auto: Name of the Auto class that finds the model.
        ids: Whether it has special tokens at all.
    """

    config: str
    model: str
    sizes: Sizes = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    ids: bool = True

    def make(self, ids: Sizes) -> Any:
        """A model with random weights in float32.

        Args:
            ids: ``eos_token_id`` and ``pad_token_id`` of the tokenizer.
        """
        import transformers

        sizes = self.sizes
        if "text_config" in sizes:
            sizes = sizes | {"text_config": sizes["text_config"] | ids}
        elif self.ids:
            sizes = sizes | ids
        config = getattr(transformers, self.config)(**sizes)
        return getattr(transformers, self.model)(config)


DECODER: Sizes = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
}
UNTIED = DECODER | {"tie_word_embeddings": False}
ENCODER: Sizes = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SEQ2SEQ: Sizes = {
    "vocab_size": 512,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "bos_token_id": 0,
    "decoder_start_token_id": 1,
}
VISION: Sizes = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS: Sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
IMAGE_TOKENS: Sizes = {
    "image_token_id": 509,
    "video_token_id": 510,
    "vision_start_token_id": 508,
    "vision_end_token_id": 507,
}

SHORT: dict[str, Architecture] = {
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM", UNTIED | {"head_dim": 32}),
    "qwen3-tied": Architecture(
        "Qwen3Config", "Qwen3ForCausalLM", DECODER | {"head_dim": 32, "tie_word_embeddings": True}
    ),
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM", UNTIED),
    "opt": Architecture(
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": 512,
            "hidden_size": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 128,
            "bos_token_id": 0,
        },
    ),
    "gpt2": Architecture(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "bos_token_id": 0},
    ),
    "qwen3-moe": Architecture(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        UNTIED | EXPERTS | {"head_dim": 32, "decoder_sparse_step": 1, "norm_topk_prob": True},
    ),
    "mixtral": Architecture(
        "MixtralConfig",
        "MixtralForCausalLM",
        DECODER | {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "t5": Architecture(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 512,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "AutoModelForSeq2SeqLM",
    ),
    "bart": Architecture(
        "BartConfig",
        "BartForConditionalGeneration",
        SEQ2SEQ | {"max_position_embeddings": 128, "forced_eos_token_id": 2},
        "AutoModelForSeq2SeqLM",
    ),
    "llava": Architecture(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "text_config": DECODER | {"model_type": "llama"},
            "image_token_index": 511,
            "tie_word_embeddings": False,
        },
        "AutoModelForImageTextToText",
    ),
    "qwen2-vl": Architecture(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        IMAGE_TOKENS
        | {
            "text_config": UNTIED
            | {
                "rope_scaling": {
                    "type": "default",
                    "rope_type": "default",
                    "mrope_section": [4, 6, 6],
                }
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "num_heads": 2,
                "hidden_size": 128,
                "mlp_ratio": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
            },
            "tie_word_embeddings": False,
        },
        "AutoModelForImageTextToText",
    ),
    "bert": Architecture("BertConfig", "BertModel", ENCODER, "AutoModel"),
    "siglip": Architecture(
        "SiglipConfig",
        "SiglipModel",
        {
            "text_config": ENCODER | {"bos_token_id": 1},
            "vision_config": VISION | {"hidden_size": 128},
        },
        "AutoModel",
    ),
}
"""Those that every run of the tests loads."""

WIDE: dict[str, Architecture] = {
    "mistral": Architecture("MistralConfig", "MistralForCausalLM", DECODER),
    "qwen2-tied": Architecture(
        "Qwen2Config", "Qwen2ForCausalLM", DECODER | {"tie_word_embeddings": True}
    ),
    "qwen2-moe": Architecture(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        DECODER | EXPERTS | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3-next": Architecture(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        DECODER
        | EXPERTS
        | {
            "num_hidden_layers": 4,  # every fourth has attention
            "head_dim": 32,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "qwen3-vl": Architecture(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        IMAGE_TOKENS
        | {
            "text_config": DECODER
            | {
                "head_dim": 32,
                "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5]},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "intermediate_size": 128,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "tie_word_embeddings": True,
        },
        "AutoModelForImageTextToText",
    ),
    "gemma2": Architecture("Gemma2Config", "Gemma2ForCausalLM", DECODER | {"head_dim": 32}),
    "gemma3": Architecture(
        "Gemma3TextConfig", "Gemma3ForCausalLM", DECODER | {"head_dim": 32, "sliding_window": 16}
    ),
    "phi3": Architecture("Phi3Config", "Phi3ForCausalLM", DECODER),
    "glm4": Architecture("Glm4Config", "Glm4ForCausalLM", DECODER | {"head_dim": 32}),
    "llama4": Architecture(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        DECODER
        | {
            "head_dim": 32,
            "intermediate_size": 64,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "attention_chunk_size": 32,
        },
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        DECODER
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 64,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt-oss": Architecture(
        "GptOssConfig",
        "GptOssForCausalLM",
        DECODER
        | {
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
    ),
    "gpt-neox": Architecture(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", ENCODER | {"bos_token_id": None}
    ),
    "falcon": Architecture(
        "FalconConfig",
        "FalconForCausalLM",
        {
            "vocab_size": 512,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    "bloom": Architecture(
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4, "bos_token_id": 0},
    ),
    "mamba": Architecture(
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    ),
    "whisper": Architecture(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"max_source_positions": 64, "max_target_positions": 64, "num_mel_bins": 8},
        "AutoModelForSpeechSeq2Seq",
    ),
    "bert-mlm": Architecture("BertConfig", "BertForMaskedLM", ENCODER, "AutoModelForMaskedLM"),
    "roberta": Architecture(
        "RobertaConfig",
        "RobertaForSequenceClassification",
        ENCODER | {"num_labels": 3},
        "AutoModelForSequenceClassification",
    ),
    "vit": Architecture(
        "ViTConfig",
        "ViTForImageClassification",
        VISION | {"num_labels": 3},
        "AutoModelForImageClassification",
        ids=False,
    ),
    "clip": Architecture(
        "CLIPConfig",
        "CLIPModel",
        {"text_config": ENCODER | {"bos_token_id": 1}, "vision_config": VISION},
        "AutoModel",
    ),
}
"""Those of `make test-models` besides."""

AUTO_CLASS = {name: made.auto for name, made in (SHORT | WIDE).items()} | {"minilm": "AutoModel"}
"""The name of the Auto class that finds a model."""
