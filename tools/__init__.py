"""Programs for the project: they made the pocket model, fetch SmolLM2 and write the docs. No run imports them."""
