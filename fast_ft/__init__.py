"""fast_ft: fine-tune a language model on one small GPU, with few good rows, in little time."""

__version__ = "0.1.0"
