"""Many trials of one recipe within a stated time: what to try, what it costs, who does it, what came of it."""
