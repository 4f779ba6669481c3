"""How many tokens vLLM's allocator says that it holds, for a model's shape alone."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kv4 import Recipe
from kv4.vllm.choice import supported_module
from kv4.vllm.rows import ROWS_WINDOW, RowsSpec

version = import_module(supported_module(vllm.__version__))
OLD = getattr(version, "PagesSpec", None)  # blocks of several pages, in vLLM 0.26
LAYERS, KV_HEADS, DIM = 32, 8, 128
SHAPE = {"num_kv_heads": KV_HEADS, "head_size": DIM, "dtype": torch.float16}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Llama 3 8B's shape."""
    folder = tmp_path_factory.mktemp("llama")
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "torch_dtype": "float16",
    }
    (Path(folder) / "config.json").write_text(json.dumps(model))
    args = EngineArgs(str(folder), skip_tokenizer_init=True, max_model_len=131072, max_num_batched_tokens=2048)
    made = args.create_engine_config()
    if OLD is None:
        made.cache_config.kv_cache_layout = "BLHNC"
    return made


def capacity(config: object, specs: dict) -> int:
    groups = get_kv_cache_groups(config, specs)
    return get_kv_cache_capacity(config, get_kv_cache_config_from_groups(config, groups, 64 << 30))[0]


def test_pages_and_exact_rows_share_blocks_and_hold_more_than_three_times_the_tokens(config: object) -> None:
    own = FullAttentionSpec(block_size=64, **SHAPE)
    if OLD is None:
        packed = version.packed_backend(Recipe()).customize_spec(own)
        rows = RowsSpec(block_size=64, sliding_window=ROWS_WINDOW, **SHAPE)
        # Rows of a quarter of the layers take the room of all layers' pages: a block has one size.
        layers = [8, 8, 8, 8, 32]
    else:
        packed = OLD(block_size=64, page_bytes=8 * 8704, **{**SHAPE, "dtype": torch.int8})
        rows = RowsSpec(block_size=64, sliding_window=ROWS_WINDOW, page_size_padded=4 * packed.page_size_bytes, **SHAPE)
        # A block of rows and one of four pages have one size.
        layers = [32, 32]
    assert own.page_size_bytes / packed.page_size_bytes > 3.7
    alone = capacity(config, {f"model.layers.{i}.attn": own for i in range(LAYERS)})
    both = {
        f"model.layers.{i}.attn{name}": spec for i in range(LAYERS) for name, spec in (("", packed), (".rows", rows))
    }
    groups = get_kv_cache_groups(config, both)
    assert sorted(len(group.layer_names) for group in groups) == layers
    print("tokens", alone, capacity(config, both))
    assert capacity(config, both) / alone > 3.4
