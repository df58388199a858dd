"""What the Gluon kernels share."""

from triton.experimental.gluon import language as gl

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of a program's threads, or of those of a partition. Triton 3.7 renamed it."""
