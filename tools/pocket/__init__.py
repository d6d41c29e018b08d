"""What made fast_ft/pocket: its rows, prompts and references, and its small base model."""
