"""Kernels proven without a GPU: compiled for each architecture, their machine code read, their results judged."""
