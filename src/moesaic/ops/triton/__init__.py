"""Experts in Triton: gathering grouped products whose saved memory does not grow with K."""

from moesaic.ops.triton.experts import experts_triton, why_not

__all__ = ["experts_triton", "why_not"]
