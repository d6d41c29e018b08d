"""A trained run as a model that other programs load: merged weights, GGUF, a Modelfile, a repository on the hub."""
