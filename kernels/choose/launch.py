"""The launches of the choice. None has been timed on a GPU; `dkv audit` finds no spilled registers."""

from dkv.kernels.common.launch import Launch, LaunchTable

# Tile: (rows, ids). Regime: the best id, or one that is drawn.
TABLE = LaunchTable(
    "choose_token",
    {
        "default": {regime: Launch((1, 2048), 8) for regime in ("best", "drawn")},
        "interpreter": {regime: Launch((256, 4096), 4) for regime in ("best", "drawn")},
    },
    tuple(Launch((1, block_v), warps) for block_v, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16))),
)
# Tile: (rows, ids, numbers of a hidden state). Regime: how many rows ("few" up to 16) and bytes of a number.
FUSED_TABLE = LaunchTable(
    "choose_token_fused",
    {
        "default": {
            ("few", 2): Launch((16, 64, 64), 8, 3),
            ("few", 4): Launch((16, 64, 32), 4, 4),
            ("many", 2): Launch((64, 128, 64), 8, 2),
            ("many", 4): Launch((64, 32, 32), 8, 2),
        },
        "sm_80": {("many", 4): Launch((64, 64, 32), 8, 2)},
        "sm_90": {
            ("few", 2): Launch((16, 128, 64), 8, 4),
            ("many", 2): Launch((64, 128, 64), 8, 3),
            ("many", 4): Launch((64, 64, 32), 8, 2),
        },
        # Twice as many ids at a time leave no register free when tokens are drawn: counted by
        # ptxas, not timed.
        "sm_100": {("few", 2): Launch((16, 64, 128), 8, 3), ("many", 2): Launch((64, 128, 64), 8, 3)},
        "gfx942": {("many", 4): Launch((64, 64, 32), 8, 2)},
        "interpreter": {
            (many, width): Launch((block_r, 1024, 64), 4)
            for many, block_r in (("few", 16), ("many", 64)) for width in (2, 4)
        },
    },
    tuple(
        Launch((block_r, block_v, block_d), warps, stages)
        for block_r in (16, 64, 128) for block_v in (64, 128) for block_d in (32, 64, 128)
        for warps in (4, 8) for stages in (2, 3, 4)
    ),
)  # fmt: skip
# Programs of a processor at a time, and the most parts of a vocabulary.
EACH, MOST_PARTS = 4, 64
FUSED_EACH, FUSED_MOST_PARTS = 2, 256
# States in a tile of the merge: as many rows as fit beside the parts.
MERGE = Launch((1024,), 4)
