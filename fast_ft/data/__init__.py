"""Rows and prompts: read, measured, selected, ordered, and written as tokens and labels.

A `Recipe` comes in. `Prepared` goes out: selected examples, stages, encoded rows and prompts. Each file here is one
step
of that way: sources and formats read, metrics measure, selection chooses, curriculum orders, encoding makes tokens.
"""
