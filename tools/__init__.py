"""Programs that made what the project ships; nothing of a run imports them."""
