"""Models and data by name: fetching them, what may lie in a model's folder, which family a config.json describes.

A hub id or a path comes in. A folder, a model's config and shape, and fingerprints go out. Every other room asks this
one for what a config.json holds. It never imports torch.
"""
