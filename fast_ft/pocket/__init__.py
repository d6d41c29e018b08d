"""The pocket world: a small base model of our own, and the rows, prompts and references to tune it on."""
