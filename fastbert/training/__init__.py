"""Training scripts, and the parts that they share: the loop, its checkpoints, its log and the card of the model."""
