"""What this machine is, and what on it would break a run."""
