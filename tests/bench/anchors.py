"""What a peer reaches on one H100 80GB HBM3, and on one and two H200s, in bf16, and our goals there.

Peer: vLLM (0.25.0 on the H100, 0.26.0 on the H200), torch 2.11.0+cu130, FlashAttention 3, torch.compile, full CUDA
graphs, asynchronous scheduling; two GPUs without NVLink multicast; offline `LLM.generate` on token ids, random weights
of the model's shape, greedy, ignore_eos, prefix cache off, max_num_seqs 256, max_model_len 16384, no detokenisation.
"""

from __future__ import annotations

from typing import Any

# (hidden_size, num_hidden_layers, vocab_size) -> name
SHAPES = {
    (4096, 32, 128256): "llama-3.1-8b",
    (8192, 80, 128256): "llama-3.1-70b",
    (1024, 28, 151936): "qwen3-0.6b",
}

Anchors = dict[str, tuple[float | None, float | None]]  # work -> (peer, goal); times in ms, rates per second

# Of one H100, by shape
ANCHORS: dict[str, Anchors] = {
    "llama-3.1-8b": {
        "start": (85.5, 12),
        "decode 1 @ 512": (6.37, 5.5),
        "decode 8 @ 512": (6.67, 5.9),
        "decode 32 @ 512": (7.81, 6.7),
        "decode 128 @ 512": (10.92, 9.9),
        "decode 256 @ 512": (15.72, 14.0),
        "prefill 1x128": (11.4, 7.5),
        "prefill 1x2048": (48.4, 46),
        "prefill 1x8192": (208.8, 200),
        "prefill 16x2048": (43_444, 45_500),
        "uniform": (8_457, 9_000),
        "sharegpt requests, 256 rows": (44.0, 54),
        "sharegpt tokens, 256 rows": (9_092, 11_150),
        "sharegpt requests, 1000 rows": (44.0, 54),
        "sharegpt tokens, 1000 rows": (9_092, 11_150),
    },
    "qwen3-0.6b": {
        "start": (96.2, 8),
        "decode 1 @ 512": (2.52, 0.95),
        "decode 8 @ 512": (3.24, 1.2),
        "decode 32 @ 512": (3.78, 1.9),
        "decode 128 @ 512": (7.37, 4.3),
        "decode 256 @ 512": (9.35, 7.2),
        "prefill 1x128": (14.9, 6),
        "prefill 16x2048": (273_000, 320_000),
        "uniform": (18_100, 21_000),
        "sharegpt requests, 256 rows": (59.7, 120),
        "sharegpt requests, 1000 rows": (59.7, 120),
    },
}

# Of H200s, by shape and how many
ON_H200: dict[tuple[str, int], Anchors] = {
    ("llama-3.1-8b", 1): {
        "decode 1 @ 512": (4.86, None),
        "decode 8 @ 512": (5.18, None),
        "decode 32 @ 512": (5.75, None),
        "decode 128 @ 512": (8.53, None),
        "decode 256 @ 512": (13.83, None),
        "prefill 1x128": (10.17, None),
        "prefill 1x2048": (48.7, None),
        "prefill 1x8192": (208.0, None),
        "prefill 16x2048": (42_686, None),
        "uniform": (10_242, None),
    },
    ("llama-3.1-8b", 2): {
        "decode 1 @ 512": (3.31, 2.5),
        "decode 8 @ 512": (3.35, None),
        "decode 32 @ 512": (3.82, 3.1),
        "decode 64 @ 512": (4.21, None),
        "decode 128 @ 512": (5.47, 4.6),
        "decode 256 @ 512": (8.68, 7.3),
        "prefill 1x2048": (33.6, 27),
        "prefill 1x8192": (124, None),
        "prefill 16x2048": (69_793, 78_000),
    },
    ("llama-3.1-70b", 2): {
        "decode 1 @ 512": (20.7, 19.0),
        "decode 8 @ 512": (21.3, None),
        "decode 32 @ 512": (21.7, 20.0),
        "decode 128 @ 512": (28.6, 25.5),
        "prefill 1x2048": (249, None),
        "prefill 16x2048": (8_368, None),
    },
}

# Modes that choose a kernel and leave weights and cache as they are; what was measured and the limits are for these.
PLAIN = {
    "triton_flashdecoding",
    "triton_gqa_attention",
    "triton_gqa_flashdecoding",
    "ppl_fp16",
    "ppl_fp16_flashdecoding",
}


def anchors_of(config: dict[str, Any], card: str, dtype: str, mode: list[str], tp: int) -> Anchors:
    """By the name of the work; empty where nothing comparable was measured."""
    name = SHAPES.get((config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]), "")
    if dtype != "bfloat16" or not PLAIN.issuperset(mode):
        return {}
    if "H200" in card:
        return ON_H200.get((name, tp), {})
    return ANCHORS.get(name, {}) if "H100" in card and tp == 1 else {}
