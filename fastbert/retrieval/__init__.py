"""Vectors of whole files, search in them, and the scores of retrieval."""
