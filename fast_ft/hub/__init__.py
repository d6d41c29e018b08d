"""Models and data by name: fetching them, what may lie in a model's folder, which family a config.json describes.

A hub id or a path comes in. A folder, a family's shape and fingerprints go out. This room never imports torch.
"""
