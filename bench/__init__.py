"""Measurements: what a recipe takes on the card at hand, and whether two ways of training do the same work."""
