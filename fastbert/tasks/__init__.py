"""What people do with a model: one module per task."""
