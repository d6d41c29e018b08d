"""Scores: by reference answers without a network, or by a model behind an OpenAI-compatible endpoint."""
