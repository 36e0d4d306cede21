"""The launches of attention.

The tile is (packed queries, slots). A regime is how many packed queries there are ("few" up to 16, "some"
up to 64, or "many"), whether a mask per slot or pair is given ("masked", else "plain"), the bytes of a
number, and the head size up to which the launch holds. A line lists (queries, slots, warps, stages) for each
pair of the last two.

No entry has been timed on a GPU. They are the largest tiles, with as many loads in flight as fit, that `dkv audit`
compiles for the architecture without spilled registers and within its shared memory.
"""

from dkv.kernels.common.launch import Launch, LaunchTable

_COLUMNS = ((2, 64), (2, 128), (2, 256), (4, 64), (4, 128), (4, 256))


def _entries(*lines: list) -> dict[tuple, Launch]:
    return {
        (many, rules, *column): Launch((m, n), warps, stages)
        for many, rules, *launches in lines
        for column, (m, n, warps, stages) in zip(_COLUMNS, launches, strict=False)
    }


_ENTRIES = {}
_ENTRIES["default"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 1), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["few", "masked", (16, 32, 4, 2), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1)],
    ["some", "plain", (32, 64, 4, 3), (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["some", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 8, 1)],
    ["many", "plain", (128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["many", "masked", (32, 32, 8, 1), (32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
)  # fmt: skip
_ENTRIES["sm_80"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 4, 1)],
    ["many", "plain", (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 1)],
    ["many", "masked", (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
)  # fmt: skip
_ENTRIES["sm_90"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)],
    ["many", "plain", (128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
    ["many", "masked", (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
)  # fmt: skip
_ENTRIES["sm_100"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 8, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 32, 4, 2)],
    ["many", "plain", (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
    ["many", "masked", (64, 64, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2)],
)  # fmt: skip
_ENTRIES["gfx942"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2)],
    ["some", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
    ["many", "plain", (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2), (32, 16, 8, 2)],
    ["many", "masked", (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
)  # fmt: skip
_ENTRIES["interpreter"] = _entries(
    *([many, rules, *[(m, 128, 4, 1)] * 6] for many, m in (("few", 16), ("some", 64), ("many", 128))
      for rules in ("plain", "masked")),
)  # fmt: skip

TABLE = LaunchTable(
    "cached_attention",
    _ENTRIES,
    candidates=tuple(
        Launch((m, n), warps, stages)
        for m in (16, 32, 64, 128) for n in (32, 64, 128) for warps in (4, 8) for stages in (2, 3)
    ),
)  # fmt: skip
