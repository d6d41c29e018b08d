"""Models and data by name: fetching them, converting .gguf files, what may lie in a model's folder, its family.

A hub id or a path comes in. A folder, a model's config and shape, and fingerprints go out. Every other room asks this
one for what a config.json holds. It never imports torch.
"""
