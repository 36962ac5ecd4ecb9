"""Sizes of the zoo's models: what the fields of a configuration become, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HIDDEN = 64
HEADS = 4
KEY_VALUE_HEADS = 2
HEAD_DIM = 16  # HIDDEN / HEADS, so that what is derived and what is set agree
ROTARY_DIM = 8  # of latent attention: half of a head
INTERMEDIATE = 128
EXPERT_INTERMEDIATE = 32
EXPERTS = 4
EXPERTS_PER_TOKEN = 2
LAYERS = 2
PATCH = 8
IMAGE = 64
POSITIONS = 512
WINDOW = 32
CHUNK = 16
SPECIAL_TOKENS = 64  # kept free at the end of the vocabulary for tokens of images, videos and audio
TEXT_TOKENS = 800
VOCABULARY = TEXT_TOKENS + SPECIAL_TOKENS
PADDING, BEGIN, END = 0, 1, 2  # of the tests' tiny tokenizer
LARGEST = 6_000_000  # parameters; more means that a rule is missing

Size = int | Callable[[int], int]


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def key_value_heads(value: int) -> int:
    return value if value <= 1 else KEY_VALUE_HEADS


# The first pattern that matches a field's whole name says what its integers become; a name that none matches is kept.
RULES: list[tuple[str, Size]] = [
    # Numbers of layers of one kind, and how often a kind comes.
    (r"max_window_layers|first_k_dense_replace|num_dense_layers|.*nextn_predict_layers", at_most(1)),
    (r".*mtp_(num_)?\w*layers", at_most(1)),
    (r".*_(period|interval|frequency|step)|sliding_window_pattern|layer_group_size", at_most(2)),
    (r"num_kv_shared_layers|.*_per_block", at_most(2)),
    (r".*_offset|depths|layers_per_stage", at_most(1)),
    (r"(?!.*offset)(\w+_)?(layers?|depth|n_layer)(_per_stack)?|num_blocks", at_most(LAYERS)),
    # Experts.
    (r"(num|n)_(?!shared)(\w+_)?experts|zero_expert_num", at_most(EXPERTS)),
    (r".*experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k", at_most(EXPERTS_PER_TOKEN)),
    (r".*shared_experts?|topk_group", at_most(1)),
    (r"(n|num)_(expert_)?groups?|o_groups", at_most(2)),
    (r"moe_.*intermediate_size|.*expert\w*_(size|dim)", at_most(EXPERT_INTERMEDIATE)),
    # The vocabulary, positions and what attention reaches.
    (r"vocab_size(_per_layer_input)?", VOCABULARY),
    (r".*vocab_size|vocab_offset", at_most(VOCABULARY)),
    (r"\w*vocab_size_base|\w*group_vocab", at_most(100)),
    (r".*max_2d_position_embeddings|index_topk|indexer_budget", at_most(128)),
    (r"n_positions|n_ctx|(max_)?seq_len|context_length", at_most(POSITIONS)),
    (r".*max_position_embeddings|max_(source|target)_positions", at_most(POSITIONS)),
    (r".*sliding_window(_size)?|attention_window_size|local_attention(_window_len)?|window_size", at_most(WINDOW)),
    (r"(mamba_)?chunk_size|attention_chunk_size", at_most(CHUNK)),
    # Heads.
    (r".*(key_value|kv)_heads?|\w*linear_num_key_heads", key_value_heads),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", at_most(ROTARY_DIM)),
    (r".*head_dim|.*dim_head|.*d_head|.*head_size|kv_channels|d_kv", at_most(HEAD_DIM)),
    (r"n_mamba_heads", at_most(2)),
    (r".*heads?", at_most(HEADS)),
    # Ranks and states.
    (r"q_lora_rank|kv_lora_rank", at_most(32)),
    (r".*rank|d_rel", at_most(8)),
    (r".*state_size|.*d_state", at_most(16)),
    # What is seen and heard.
    (r"(?!temporal)\w*patch_sizes?", at_most(PATCH)),
    (r".*image_size|.*img_size|resolution", at_most(IMAGE)),
    (r"num_position_embeddings|position_embedding_size", at_most((IMAGE // PATCH) ** 2)),
    (r"\w*(num|n)_(\w+_)?(tokens|queries|latents|patches)|latent_query_num", at_most(16)),
    # Widths.
    (r".*intermediate_size\w*|.*ffn.*(dim|size)|.*mlp_dim|feed_forward_size", at_most(INTERMEDIATE)),
    (r"d_ff|dff|dim_ff|d_inner|n_inner", at_most(INTERMEDIATE)),
    (r"channel_multiplier", at_most(1)),
    (r"num_embeddings", at_most(HIDDEN)),
    (r"base_channels", at_most(32)),
    (r"(?!.*(kernel|stride|chunk))\w*(size|dim|width|channel|feature|dimension)s?|d_model|n_embd", at_most(HIDDEN)),
]  # fmt: skip
# What a field that says nothing becomes: models need these, and published configurations have them.
MISSING: list[tuple[str, int]] = [
    (r"head_dim", HEAD_DIM),
    (r"indexer_head_dim", HEAD_DIM),
    (r"num_key_value_heads", HEADS),
    (r"indexer_n_heads", HEADS),
    (r"indexer_kv_heads", 1),
    (r"indexer_budget", 8),
    (r"indexer_compress_ratio", 4),
    (r"(num|n)_(routed_|local_)?experts", EXPERTS),
    (r"num_experts_per_tok|top_k_experts", EXPERTS_PER_TOKEN),
    (r"n_shared_experts", 1),
    (r"moe_intermediate_size", EXPERT_INTERMEDIATE),
]
# Single configurations, by their model type: what no rule can know, and why.
OVERRIDES: dict[str, dict[str, Any]] = {
    # Both decode images from the vocabulary, and a published configuration says which token is which.
    "chameleon": {"vocabulary_map": {"<image>": TEXT_TOKENS, "IMGIMGAAAZ": TEXT_TOKENS + 1}},
    "emu3": {
        "vocabulary_map": {"<image>": TEXT_TOKENS, "<|extra_200|>": TEXT_TOKENS + 1,
                           "<|visual token 000000|>": TEXT_TOKENS + 2}
    },
    # Published configurations have these, and the class has no default that works.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "granite4_vision": {"deepstack_layer_map": [(-1, 0)], "downsample_rate": "4/8"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW},
    # The defaults are state spaces only, and the model needs attention in a layer.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling_vision": {"patch_size": 2, "num_hidden_layers": 3},  # wide as the patch squared; fewer layers need SciPy
    "reformer": {"axial_pos_embds": False},  # with them every training sequence has one fixed length
    "xlstm": {"qk_dim_factor": 1.0},  # or widths are rounded to multiples of 64 in one place only
}  # fmt: skip
