"""The models: layers and parameters, the families as data, HuggingFace's model directories."""
