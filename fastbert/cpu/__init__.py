"""The ops for CPU tensors, faster than the reference."""
