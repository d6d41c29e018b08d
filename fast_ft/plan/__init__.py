"""Memory and time, predicted before the first step: the training plan, the decoding plan, and what cards can do.

Shapes, row lengths and a card come in. A frozen plan goes out. Nothing is loaded here.
"""
