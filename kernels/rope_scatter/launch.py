"""The launches of `rope_scatter_`. None has been timed on a GPU; `dkv audit` finds no spilled registers."""

from dkv.kernels.common.launch import Launch, LaunchTable

# Tile: (heads of tokens,). Regime: head size up to. 1024 numbers to a program keep the accesses of 2-byte numbers
# 128 bits wide, and leave enough programs to fill a GPU when few tokens are active.
SIZES = (32, 64, 128, 256)
TABLE = LaunchTable(
    "rope_scatter_",
    {
        "default": {size: Launch((1024 // size,), 2) for size in SIZES},
        "interpreter": {size: Launch((256,), 2) for size in SIZES},
    },
    candidates=tuple(Launch((rows,), warps) for rows in (4, 8, 16, 32) for warps in (1, 2, 4)),
)
