"""A causal depthwise convolution over the last few tokens, with its state."""

from refine_kernels.short_conv.reference import short_conv

__all__ = ["short_conv"]
