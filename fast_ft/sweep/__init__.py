"""Many trials of one recipe within a stated time: what to try, what it costs, who does it, what came of it.

A recipe with a `search` section comes in. The best recipe, a page and every trial's run folder go out.
"""
