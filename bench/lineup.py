"""The line-up: the ways to generate that benchmarks compare, by name, in the words of `dkv eval --run`.

Nothing heavy is imported here, so that the command line can name them at once. `dkv.bench.contenders` reads the texts.
"""

from collections.abc import Sequence
from typing import Any

# Greedy goes with the random order, as published, or plans by confidences; all others fill the surest slot first.
LINEUP = {
    "plain": "cache=none",
    "decode 8": "cache=decode refresh=8",
    "decode 32": "cache=decode refresh=32",
    "prefill": "cache=prefill",
    "pd 8": "cache=pd refresh=8",
    "greedy 4": "cache=greedy refresh=4 window=4 confidence=random",
    "greedy 16": "cache=greedy refresh=16 window=4 confidence=random",
    "greedy 4 planned": "cache=greedy refresh=4 window=4",
    "plain half": "steps=half",
    "decode 4": "cache=decode refresh=4",
    "decode, no refresh": "cache=decode refresh=0 warmup=1",
    "greedy 2 planned": "cache=greedy refresh=2 window=4",
    "greedy, no refresh": "cache=greedy refresh=0 window=4 confidence=random",
    "prefix": "cache=prefix",
    "dual": "cache=dual",
    "prefix delayed": "cache=prefix delayed=true",
    "dual delayed": "cache=dual delayed=true",
    "dual in parts": "cache=dual block_length=8",
    "dual in parts delayed": "cache=dual block_length=8 delayed=true",
    "suffix 96": "cache=suffix window=96",
    "suffix 96 dual": "cache=suffix window=96 base=dual",
    "rollout": "cache=rollout",
    "elastic": "cache=elastic",
    "skip": "cache=skip",
}
PLAIN = "plain"
# What `dkv bench` compares, `dkv demo` shows, and what runs with blocks or on a GPU; plain decoding first.
COMPARED = tuple(LINEUP)[:8]
SHOWN = ("plain", "decode 8", "decode 4", "prefill", "pd 8", "greedy 4 planned", "greedy 2 planned", "plain half")
# The same of a block-causal model, in parts of its blocks.
SHOWN_IN_BLOCKS = ("plain", "decode 8", "decode, no refresh", "dual in parts", "dual in parts delayed", "plain half")
BLOCKED = ("plain", "prefix", "dual", "prefix delayed", "dual delayed", "suffix 96", "suffix 96 dual", "skip")
# Those that may be compared in blocks.
IN_BLOCKS = (*BLOCKED, "rollout", "elastic")
# What requests are served with; the first by default.
SERVED = ("decode 8", "dual in parts", "dual", "greedy 16", "prefill")
ON_GPU = ("plain", "decode 8", "greedy 4", "prefill")
# How many tokens a step fills: settings that go with the block policies.
RULES = {"one a step": {}, "threshold 0.9": {"threshold": 0.9}}

# The grids of `dkv eval`: by default, and with --full the axes of the paper: every policy, refresh interval, window
# and rule, at one and at two slots a step.
QUICK = (
    "steps=half",
    "cache=prefill",
    "cache=decode refresh=4,8,16",
    "cache=pd refresh=8",
    "cache=greedy refresh=4,8,16 window=4 window_center=last",
)
FULL = (
    "cache=none,prefill steps=all,half",
    "cache=decode,pd refresh=2,4,8,16 steps=all,half",
    "cache=greedy refresh=2,4,8,16 window=0,2,4,8 window_center=next,last",
    "cache=greedy refresh=2,4,8,16 window=0,2,4,8 steps=half window_center=last",
    "cache=none,greedy confidence=random steps=all,half",
    "cache=greedy refresh=2,4,8,16 window=0,2,4,8 confidence=random",
    "cache=none confidence=margin,entropy",
)
# What `dkv suggest` tries, from careful to bold.
SUGGESTED = (
    "cache=decode refresh=8,32",
    "cache=prefix,dual,suffix block_length=32",
    "cache=none,decode,rollout,elastic threshold=0.99,0.95",
    "cache=decode entropy_bound=0.01,0.1",
    "cache=decode threshold=0.95 near_threshold=0.9",
    "cache=prefix,dual,suffix,skip block_length=32 threshold=0.99,0.95",
    "cache=sliding schedule=sliding block_length=32 threshold=0.99,0.95",
    "cache=greedy refresh=8 window=4 window_center=last",
)
# Both of a block-causal model; {part} is a quarter of its blocks.
QUICK_IN_BLOCKS = (
    "steps=half",
    "cache=decode refresh=8",
    "cache=decode refresh=0 warmup=1",
    "cache=dual block_length={part} delayed=false,true",
    "cache=none,decode threshold=0.9",
)
SUGGESTED_IN_BLOCKS = (
    "cache=decode refresh=8,32",
    "cache=dual block_length={part} delayed=false,true",
    "cache=none,decode threshold=0.99,0.95",
    "cache=decode entropy_bound=0.01,0.1",
    "cache=dual block_length={part} threshold=0.99,0.95",
)
# Further runs of a model whose logits are shifted.
SHIFTED = ("cache=decode,pd refresh=2,4,8,16 shift_rule=un_right",)

LONG, BATCHED = ("plain", "decode 32", "prefill", "pd 8"), ("plain", "decode 8", "greedy 4")
# What --all measures: file -> measurement, batches, and settings of `dkv.bench.options`. Eager runs and
# long canvases cost most of the time, hence few rounds of them.
ALL: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "comparison": ("comparison", (1,), {"new": 64, "policies": COMPARED[:-1]}),
    "long": ("comparison", (1,), {"prompt": 896, "new": 64, "rounds": 1, "eager": False, "policies": LONG}),
    "batches": ("comparison", (1, 2, 4), {"new": 32, "rounds": 1, "policies": BATCHED}),
    "floor": ("floor", (1,), {}),
    "growth": ("growth", (1,), {"prompt": 64, "eager": False}),
    "memory": ("memory", (1,), {}),
    "blocks": ("blocks", (1,), {"new": 64, "rounds": 1, "rules": ("one a step",)}),
    "blocks_tiny": ("blocks", (1,), {"model": "tiny"}),
}


def in_blocks(runs: Sequence[str], block_length: int) -> list[str]:
    """Runs of a model with such blocks."""
    return [text.format(part=max(block_length // 4, 1)) for text in runs]
