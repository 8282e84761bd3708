"""Training scripts and what they share: the loop, checkpoints, the log, the model card."""
