"""The ways to load a model for training and for answering: Unsloth, PEFT, and PEFT with our fused block."""
