"""A decoder block for training: forward and backward by hand, in as few and as large products as there are."""
