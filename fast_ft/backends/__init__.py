"""The ways to load and train a model; backend.py chooses among them."""
