"""The most confident tokens go into the canvas."""

from dkv.kernels.commit.op import commit_

__all__ = ["commit_"]
