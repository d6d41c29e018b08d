"""Answers to prompts, by an adapter: from prompts' tokens to texts, through the engine below.

A loaded model, encoded prompts and a decoding plan come in. Answers go out, in the prompts' order.
"""
