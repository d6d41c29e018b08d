"""Decoding: a pool of slots over a paged KV cache, its step captured in a CUDA graph where there is CUDA."""
