"""The models: their parameters, the families as data, and HuggingFace's directories in and out."""
