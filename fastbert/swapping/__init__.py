"""Other people's models on our ops: modules of transformers and torch.nn replaced in place, and taken back."""
