"""Models of a megabyte with random weights, in GGUF files that llama.cpp loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

VOCABULARY = 5 + 256 + 95


@dataclass(frozen=True)
class Tiny:
    architecture: str = "llama"
    layers: int = 2
    embedding: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 512
    context: int = 4096
    seed: int = 1
    shared: int = 0  # last layers that read the cache of an earlier one (gemma4)
    ends: bool = True  # False: control tokens are never drawn (qwen2 alone has the bias for it)


TINY = {
    "llama": Tiny(),
    "qwen2": Tiny("qwen2", ends=False),
    "gemma3": Tiny("gemma3", layers=7, kv_heads=1),  # layer 5 sees all, the others 96 tokens
    "gemma4": Tiny("gemma4", layers=10, kv_heads=1, shared=5),  # 4 and 9 see all; 5 and later read 3 and 4
    "wide": Tiny(kv_heads=4, head_dim=128, context=32768),
    "head of 16": Tiny(heads=8, kv_heads=8, head_dim=16),
    "head of 80": Tiny(heads=4, kv_heads=4, head_dim=80),
}


def write(tiny: Tiny, path: Path, change: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    file = gguf.GGUFWriter(path, tiny.architecture)
    _metadata(file, tiny)
    _vocabulary(file)
    if change is not None:
        change(file)
    random = np.random.default_rng(tiny.seed)

    def vector(name: str, size: int, mean: float = 1, deviation: float = 0.1) -> None:
        file.add_tensor(name, random.normal(mean, deviation, size).astype(np.float32))

    def matrix(name: str, width: int, rows: int) -> None:
        file.add_tensor(name, random.normal(0, width**-0.5, (rows, width)).astype(np.float32))

    matrix("token_embd.weight", tiny.embedding, VOCABULARY)
    vector("output_norm.weight", tiny.embedding)
    if tiny.architecture == "llama":
        matrix("output.weight", tiny.embedding, VOCABULARY)
    if not tiny.ends:
        file.add_tensor("output.bias", np.where(np.arange(VOCABULARY) < 5, -100, 0).astype(np.float32))
    if tiny.architecture == "gemma4":
        vector("rope_freqs.weight", tiny.head_dim // 2, 2, 0.3)
    for layer in range(tiny.layers):
        _layer(tiny, f"blk.{layer}", layer < tiny.layers - tiny.shared, vector, matrix)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def _layer(
    tiny: Tiny, at: str, own_cache: bool, vector: Callable[..., None], matrix: Callable[[str, int, int], None]
) -> None:
    queries, keys = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
    gemma = tiny.architecture.startswith("gemma")
    vector(f"{at}.attn_norm.weight", tiny.embedding)
    matrix(f"{at}.attn_q.weight", tiny.embedding, queries)
    matrix(f"{at}.attn_output.weight", queries, tiny.embedding)
    if own_cache:
        matrix(f"{at}.attn_k.weight", tiny.embedding, keys)
        matrix(f"{at}.attn_v.weight", tiny.embedding, keys)
    if tiny.architecture == "qwen2":
        vector(f"{at}.attn_q.bias", queries, 0, 0.5)
        vector(f"{at}.attn_k.bias", keys, 0, 0.5)
        vector(f"{at}.attn_v.bias", keys, 0, 0.5)
    if gemma:
        vector(f"{at}.attn_q_norm.weight", tiny.head_dim)
        if own_cache:
            vector(f"{at}.attn_k_norm.weight", tiny.head_dim)
        vector(f"{at}.post_attention_norm.weight", tiny.embedding)
        vector(f"{at}.post_ffw_norm.weight", tiny.embedding)
    vector(f"{at}.ffn_norm.weight", tiny.embedding)
    matrix(f"{at}.ffn_gate.weight", tiny.embedding, tiny.feed_forward)
    matrix(f"{at}.ffn_up.weight", tiny.embedding, tiny.feed_forward)
    matrix(f"{at}.ffn_down.weight", tiny.feed_forward, tiny.embedding)


def _metadata(file: gguf.GGUFWriter, tiny: Tiny) -> None:
    file.add_block_count(tiny.layers)
    file.add_context_length(tiny.context)
    file.add_embedding_length(tiny.embedding)
    file.add_feed_forward_length(tiny.feed_forward)
    file.add_head_count(tiny.heads)
    file.add_head_count_kv(tiny.kv_heads)
    file.add_key_length(tiny.head_dim)
    file.add_value_length(tiny.head_dim)
    file.add_rope_dimension_count(tiny.head_dim)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(50000.0)
    prefix = tiny.architecture
    if prefix in ("gemma3", "gemma4"):
        file.add_sliding_window(96)
    if prefix == "gemma4":
        file.add_uint32("gemma4.embedding_length_per_layer_input", 0)
        file.add_uint32("gemma4.attention.shared_kv_layers", tiny.shared)
        file.add_uint32("gemma4.attention.key_length_swa", tiny.head_dim)
        file.add_uint32("gemma4.attention.value_length_swa", tiny.head_dim)
        file.add_uint32("gemma4.rope.dimension_count_swa", tiny.head_dim)
        file.add_array("gemma4.attention.sliding_window_pattern", [layer % 5 != 4 for layer in range(tiny.layers)])


def _vocabulary(file: gguf.GGUFWriter) -> None:
    """Control tokens, the 256 bytes, the printable characters."""
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokens += ["\u2581" if c == 32 else chr(c) for c in range(32, 127)]
    kinds = [2, 3, 3, 3, 3] + [6] * 256 + [1] * 95
    assert len(tokens) == VOCABULARY
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens)
    file.add_token_scores([-1.0] * VOCABULARY)
    file.add_token_types(kinds)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_add_bos_token(True)
    file.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
