"""The run folder: its paths, its files as records, its lock, and what the run was made of.

A `Recipe` comes in. A `RunDir` goes out, whose manifest says which phases are done. No engine is imported here.
"""
