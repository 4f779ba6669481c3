"""The tables of docs/metal_model.md: what attention over the cache would take on Apple GPUs. Not a measurement.

    python tests/metal/model.py > tables.md        needs clang 19, as the emulator does

A cached token costs the larger of its bytes over the memory bandwidth and its lane-instructions over the rate at which
the GPU issues them; both come from kernels executed in emulation (measure.py). The fp16 cache it is compared with is
ideal: every byte once at full bandwidth, no instruction counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from measure import cost, row_cost

# Memory bandwidth in GB/s and TFLOPS of fp32 as Apple published them; docs/metal_model.md has the documents. Apple
# gives no TFLOPS for M3 Max and M4 Max: M1's 0.325 per core times their 40 cores, a lower bound.
CHIPS = {"M1": (68.25, 2.6), "M1 Max": (400.0, 10.4), "M3 Max": (400.0, 13.0), "M4 Max": (546.0, 13.0)}
CONTEXTS = (256, 512, 1024, 2048, 4096, 32768)
SINKS, WINDOW = 4, 96  # exact tokens of the default recipe; the window holds 64 to 127, 96 on average


@dataclass(frozen=True)
class Geometry:
    name: str
    layers: int
    sliding_layers: int
    sliding_window: int
    heads: int
    kv_heads: int
    dim: int
    parameters: float  # 10^9

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


MODELS = [
    Geometry("Gemma-3 1B", 26, 22, 512, 4, 1, 256, 1.0),
    Geometry("Qwen2.5-1.5B", 28, 0, 0, 12, 2, 128, 1.54),
    Geometry("SmolLM2-360M", 32, 0, 0, 15, 5, 64, 0.36),
    Geometry("SmolLM2-1.7B", 24, 0, 0, 32, 32, 64, 1.71),
]


def seconds(bytes_: float, instructions: float, chip: str) -> float:
    bandwidth, tflops = CHIPS[chip]
    return max(bytes_ / (bandwidth * 1e9), instructions / (tflops * 1e12 / 2))


def layer(g: Geometry, tokens: int, chip: str) -> tuple[float, float]:
    """Seconds of attention over `tokens` tokens in one layer: fp16, kv4."""
    fp16 = seconds(tokens * g.kv_heads * 4 * g.dim, 0, chip)
    packed = max(tokens - SINKS - WINDOW, 0) // 64 * 64
    exact = tokens - packed
    page, row = cost(g.dim, g.group), cost(g.dim, g.group, True)
    # Queries and outputs are rotated; states are written and read again.
    splits = 1 + min(-(-packed // 512), 64)
    rotate = g.heads * sum(row_cost(g.dim, splits, 2 if packed else 0))
    states = 2 * 4 * splits * g.heads * (g.dim + 2)
    bytes_ = g.kv_heads * (packed * page.bytes + exact * row.bytes) + states
    instructions = g.kv_heads * (packed * page.lane_instructions + exact * row.lane_instructions) + rotate
    return fp16, seconds(bytes_, instructions, chip)


def step(g: Geometry, tokens: int, chip: str) -> tuple[float, float, float]:
    """Milliseconds of one generated token: reading fp16 weights, attention over an fp16 cache, over kv4."""
    weights = seconds(g.parameters * 2e9, 0, chip)
    full = layer(g, tokens, chip)
    sliding = layer(g, min(tokens, g.sliding_window), chip) if g.sliding_layers else (0.0, 0.0)
    both = [(g.layers - g.sliding_layers) * f + g.sliding_layers * s for f, s in zip(full, sliding, strict=True)]
    return weights * 1e3, both[0] * 1e3, both[1] * 1e3


def print_costs() -> None:
    print("| d | rows | kind | bytes | lane-instructions | multiply-adds | memory | integer | widenings | rest |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    shapes = [(128, r, False) for r in (1, 2, 3, 4, 6, 8)] + [(256, 4, False), (64, 3, False), (64, 1, False)]
    for dim, rows, exact in [*shapes, (128, 6, True), (256, 4, True), (64, 3, True), (64, 1, True)]:
        c = cost(dim, rows, exact)
        parts = [c.by_class.get(k, 0.0) for k in ("float", "memory", "integer", "convert")]
        numbers = [c.lane_instructions, *parts, c.lane_instructions - sum(parts)]
        kind = "exact" if exact else "int4"
        print(f"| {dim} | {rows} | {kind} | {c.bytes:.1f} | " + " | ".join(f"{n:,.0f}" for n in numbers) + " |")


def print_models() -> None:
    print("| model | tokens | " + " | ".join(f"{c}: fp16, kv4 | speed-up" for c in CHIPS) + " |")
    print("|---|---|" + "---|---|" * len(CHIPS))
    for g in MODELS:
        for tokens in CONTEXTS:
            cells = []
            for chip in CHIPS:
                _, fp16, kv4 = step(g, tokens, chip)
                cells += [f"{fp16:.3f}, {kv4:.3f}", f"{fp16 / kv4:.2f}"]
            print(f"| {g.name} | {tokens:,} | " + " | ".join(cells) + " |")


def print_steps() -> None:
    print("| model | tokens | weights | with fp16 cache | with kv4 | change |")
    print("|---|---|---|---|---|---|")
    for g in MODELS:
        for tokens in CONTEXTS:
            weights, fp16, kv4 = step(g, tokens, "M1")
            change = (weights + kv4) / (weights + fp16) - 1
            numbers = f"{weights:.1f} | {weights + fp16:.2f} | {weights + kv4:.2f} | {100 * change:+.1f} %"
            print(f"| {g.name} | {tokens:,} | {numbers} |")


if __name__ == "__main__":
    for table in (print_costs, print_models, print_steps):
        table()
        print(flush=True)
