"""Every operation at every step of `dkv.bench.ops.sizes`, all ways of a step in a row."""

import pytest

from dkv.bench.gpu.cases import OURS
from dkv.bench.gpu.operations import OPERATIONS
from dkv.bench.ops.sizes import STEPS

WAYS = {"cached_attention": ("eager", "sdpa", "flex", *OURS)}


@pytest.mark.parametrize(
    ("operation", "step", "way"),
    [(name, step, way) for name in OPERATIONS for step in STEPS for way in WAYS.get(name, ("eager", *OURS))],
)
def test_operation(measure, operation, step, way):
    measure(operation, step, way)
