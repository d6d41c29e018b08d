"""Rows and prompts: read, measured, selected, ordered, and written as tokens and labels.

A `Recipe` comes in. `PreparedData` goes out: selected examples, stages, encoded rows and prompts. Each file here is one
step: sources and formats read, metrics measure, selection chooses, curriculum orders, encoding makes tokens, and
prepare calls them in this order.
"""
