"""ReFINE, one idea per file: positions, rollout, reward, advantage, loss; `step` is the paper's box."""

from refine_harness.algorithm.step import collect, refine_step

__all__ = ["collect", "refine_step"]
