"""Scores for answers: by reference answers without a network, or by a model behind an OpenAI-compatible server.

Questions, references and answers come in as text. Judgments, their mean and its interval go out. This room knows no run
folder and no engine.
"""
