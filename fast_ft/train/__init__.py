"""Training over stages: TRL's SFTTrainer, our forward and backward passes, optimizer, checkpoints and recovery.

Encoded rows, a plan and a loaded model come in. A trained adapter and one log line for each step go out. This room does
not know the run folder: `pipeline` hands it places and callbacks.
"""
