"""Uses of a trained model, one module per task."""
