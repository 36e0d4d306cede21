"""The checks of `dkv.bench.gpu`, which `python -m dkv.bench.gpu checks` runs without pytest."""

import pytest
import torch

from dkv.bench.gpu.checks import CHECKS, run_check
from dkv.bench.gpu.tools import Skipped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name: str) -> None:
    try:
        run_check(name, torch.device("cuda", torch.cuda.current_device()), "triton")
    except Skipped as reason:
        pytest.skip(str(reason))
