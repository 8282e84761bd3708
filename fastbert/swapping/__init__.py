"""Replaces modules of transformers and torch.nn in place by modules that run the ops, and undoes it."""
