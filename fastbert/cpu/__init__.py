"""Ops for CPU tensors; by name: ops.py."""
