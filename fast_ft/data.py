"""Rows and prompts (being written)."""
