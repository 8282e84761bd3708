"""From text files to packed batches: reading, tokenizers, token shards, sequences, masking."""
