"""What every program needs and no model does: errors, console, safe text, atomic files, signals, the GPU at hand.

Nothing here knows rows, models or recipes, and nothing here imports another room. What comes in are plain values and
paths; what goes out are files, messages and errors that a user can act on.
"""
