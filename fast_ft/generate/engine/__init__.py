"""The decoding engine: scheduler, paged KV cache, prefill, model runner, sampler, kernels.

The scheduler decides from lengths alone. What runs on the device is captured in CUDA graphs where there is CUDA.
"""
