"""Checks of the kernels without a GPU: compiles them for every architecture and reads the machine code."""
