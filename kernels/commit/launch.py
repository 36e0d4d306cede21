"""The launches of the commit. None has been timed on a GPU; `dkv audit` finds no spilled registers."""

from dkv.kernels.common.launch import Launch, LaunchTable

# Tile: (entries that are ranked, entries they are compared with at a time). One regime: all.
TABLE = LaunchTable(
    "commit_",
    {"default": {"all": Launch((16, 256), 4)}, "interpreter": {"all": Launch((128, 128), 4)}},
    candidates=tuple(
        Launch(tile, warps) for tile in ((8, 256), (16, 128), (16, 256), (32, 256)) for warps in (2, 4, 8)
    ),
)
