"""Turns text files into packed batches: reading, tokenizers, token shards, sequences, masking."""
