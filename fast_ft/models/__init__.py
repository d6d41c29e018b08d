"""Loaded models: loaders, packed attention, activation checkpointing, 4-bit weights, LoRA files, our fused block.

A model's folder and a recipe's `model` and `lora` sections come in. A loaded model with an adapter goes out, ready to
train or to answer, and adapter files that plain PEFT reads.
"""
