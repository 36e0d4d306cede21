"""The launch table of attention: tile sizes, warps and stages by architecture and regime."""

from itertools import product

from dkv.kernels.common.launch import Launch, LaunchTable

# The launches. The tile is (packed queries, slots). A regime is how many packed queries there are ("few" up to 16,
# "some" up to 64, or "many"), whether a mask per slot or pair is given ("masked", else "plain") and ends of the queries
# (then also "ends"), the bytes of a number, and the head size up to which the launch holds. A line lists (queries,
# slots, warps, stages) for each pair of the last two. No entry has been timed on a GPU. They are the largest tiles,
# with as many loads in flight as fit, that `dkv audit` compiles for the architecture without spilled registers and
# within its shared memory.
_COLUMNS = ((2, 64), (2, 128), (2, 256), (4, 64), (4, 128), (4, 256))


def _entries(*lines: list) -> dict[tuple, Launch]:
    return {
        (many, rules, *column): Launch((m, n), warps, stages)
        for many, rules, *launches in lines
        for column, (m, n, warps, stages) in zip(_COLUMNS, launches, strict=False)
    }


_ENTRIES = {}
_ENTRIES["default"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 32, 4, 3), (16, 32, 4, 1), (16, 32, 8, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["few", "masked", (16, 32, 4, 2), (16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 4, 2), (16, 16, 8, 2), (16, 16, 8, 1)],
    ["some", "plain", (32, 64, 4, 3), (32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["some", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 4, 2), (16, 16, 8, 2), (16, 16, 8, 1)],
    ["many", "plain", (128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 4, 1), (16, 16, 8, 1)],
    ["many", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 1), (16, 32, 4, 2), (16, 16, 8, 2), (16, 16, 8, 1)],
)
_ENTRIES["sm_80"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 4, 1)],
    ["many", "plain", (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 1), (64, 32, 8, 2)],
    ["many", "masked", (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
)
# A program has 99 KB of shared memory here, where it has 163 on sm_80. sm_89 uses these too.
_ENTRIES["sm_86"] = _ENTRIES["sm_80"] | {
    ("few", "plain", 2, 256): Launch((16, 32), 4, 3),
    ("some", "plain", 2, 256): Launch((32, 32), 8, 3),
    ("some", "masked", 2, 256): Launch((32, 32), 8, 2),
    ("many", "masked", 2, 256): Launch((32, 32), 8, 2),
}
# As much shared memory, and a compiler that needs more registers.
_ENTRIES["sm_120"] = _ENTRIES["sm_86"] | {
    ("many", "plain", 2, 128): Launch((64, 64), 8, 3),
    ("many", "plain", 4, 64): Launch((32, 32), 8, 2),
}
# With 64 queries the products are wgmma. Compiled for "some", D 128: 64 x 32 takes 164 registers and 64 KB, so that 3
# programs share a multiprocessor; 32 x 64 takes 226 and 76 KB, and 2 do. D 64: 117 against 128 registers.
_ENTRIES["sm_90"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (64, 32, 4, 3), (64, 32, 4, 3), (32, 32, 4, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)],
    ["many", "plain", (128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)],
    ["many", "masked", (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
)
_ENTRIES["sm_100"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 8, 3)],
    ["some", "masked", (32, 64, 4, 2), (32, 32, 4, 2)],
    ["many", "plain", (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)],
    ["many", "masked", (64, 64, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2)],
)
_ENTRIES["gfx942"] = _entries(
    ["few", "plain", (16, 64, 4, 3), (16, 64, 4, 3)],
    ["some", "plain", (32, 64, 4, 3), (32, 64, 4, 3), (32, 32, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2), (32, 32, 4, 2)],
    ["some", "masked", (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
    ["many", "plain", (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2), (32, 16, 8, 2)],
    ["many", "masked", (64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)],
)
_TILES = {"few": 16, "some": 64, "many": 128}
_ENTRIES["interpreter"] = {regime: Launch((_TILES[regime[0]], 128), 4) for regime in _ENTRIES["default"]}

# With ends of the queries the launches are the same, but where those would spill registers.
_ENDS = {
    "default": {
        **{(many, f"{rules} ends", 4, 256): Launch((16, 16), 4) for many in _TILES for rules in ("plain", "masked")},
        **{(many, "masked ends", 4, 64): Launch((16, 32), 4) for many in _TILES},
        **{(many, "masked ends", 2, 128): Launch((32, 32), 8, 2) for many in ("some", "many")},
    },
    "sm_80": {
        ("many", "plain ends", 2, 256): Launch((64, 32), 8, 2),
        ("many", "plain ends", 4, 64): Launch((32, 64), 8, 2),
    },
    "sm_86": {
        **{(many, "masked ends", 2, 256): Launch((32, 32), 8) for many in ("some", "many")},
        ("many", "plain ends", 2, 256): Launch((64, 32), 8, 2),
        ("many", "plain ends", 4, 64): Launch((32, 64), 8, 2),
    },
    "sm_90": {("some", "masked ends", 2, 128): Launch((32, 32), 8, 2)},
    "sm_100": {("some", "masked ends", 2, 128): Launch((32, 32), 8, 2)},
    "sm_120": {("many", "plain ends", 2, 256): Launch((64, 32), 8, 2)},
}
for _arch, _of_arch in _ENTRIES.items():
    _same = {(many, f"{rules} ends", *column): launch for (many, rules, *column), launch in _of_arch.items()}
    _ENTRIES[_arch] = _of_arch | _same | _ENDS.get(_arch, {})

# Keys and values in 8 bits, which no mask goes with. The cast to the dtype of the queries takes registers, so that some
# of these launches would spill.
_INT8 = {
    "default": {
        **{(many, "plain int8", 4, 256): Launch((16, 32), 4) for many in _TILES},
        **{(many, "plain ends int8", 4, 256): Launch((16, 16), 8) for many in _TILES},
        ("few", "plain int8", 2, 256): Launch((16, 16), 4),
        **{("many", f"{rules} int8", 2, 64): Launch((128, 32), 8, 2) for rules in ("plain", "plain ends")},
        **{("many", f"{rules} int8", 2, 256): Launch((32, 16), 8, 2) for rules in ("plain", "plain ends")},
        ("some", "plain ends int8", 2, 64): Launch((32, 64), 8, 3),
    },
    "sm_80": {
        ("some", "plain int8", 2, 256): Launch((32, 32), 8, 3),
        ("many", "plain int8", 2, 128): Launch((128, 16), 8, 3),
        ("many", "plain int8", 4, 64): Launch((64, 16), 8, 2),
    },
    "sm_86": {
        **{("some", f"{rules} int8", 2, 128): Launch((32, 64), 8, 3) for rules in ("plain", "plain ends")},
        ("many", "plain int8", 2, 128): Launch((128, 16), 8, 3),
        ("many", "plain int8", 4, 64): Launch((64, 16), 8, 2),
    },
    "sm_90": {
        **{("many", f"{rules} int8", 2, 64): Launch((128, 64), 8, 3) for rules in ("plain", "plain ends")},
        **{("many", f"{rules} int8", 2, 256): Launch((64, 16), 8, 2) for rules in ("plain", "plain ends")},
        **{("many", f"{rules} int8", 4, 64): Launch((64, 16), 8, 2) for rules in ("plain", "plain ends")},
        ("many", "plain int8", 2, 128): Launch((64, 64), 8, 3),
        ("some", "plain ends int8", 2, 128): Launch((64, 32), 8, 3),
    },
    "sm_100": {
        ("few", "plain int8", 2, 128): Launch((16, 64), 8, 3),
        ("few", "plain ends int8", 2, 256): Launch((16, 64), 8, 3),
        **{("many", f"{rules} int8", 2, 64): Launch((128, 32), 8, 3) for rules in ("plain", "plain ends")},
        **{("many", f"{rules} int8", 4, 64): Launch((64, 16), 8, 2) for rules in ("plain", "plain ends")},
        ("many", "plain int8", 2, 128): Launch((64, 32), 8, 3),
        ("many", "plain ends int8", 2, 128): Launch((128, 32), 8, 3),
    },
    "sm_120": {("few", "plain int8", 2, 128): Launch((16, 64), 8, 3)},
    "gfx942": {
        ("few", "plain int8", 2, 256): Launch((16, 32), 8),
        ("many", "plain int8", 2, 64): Launch((128, 32), 8, 3),
        ("many", "plain int8", 2, 256): Launch((64, 16), 8, 2),
        ("some", "plain ends int8", 2, 64): Launch((32, 64), 8, 3),
        ("some", "plain ends int8", 4, 64): Launch((32, 32), 4, 3),
        ("some", "plain ends int8", 4, 128): Launch((32, 32), 8, 2),
        ("some", "plain ends int8", 4, 256): Launch((32, 16), 4, 2),
    },
}
for _arch, _of_arch in _ENTRIES.items():
    _same = {(many, f"{rules} int8", *column): launch for (many, rules, *column), launch in _of_arch.items()}
    _same = {regime: launch for regime, launch in _same.items() if regime[1].startswith("plain")}
    _ENTRIES[_arch] = _of_arch | _same | _INT8.get(_arch, {})

_CANDIDATES = product((16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
TABLE = LaunchTable("cached_attention", _ENTRIES, [Launch((m, n), *how) for m, n, *how in _CANDIDATES])
