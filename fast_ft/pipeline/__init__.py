"""The whole run on one page, its phases, and what surrounds them: resume, backup, preview, rerun.

A `Recipe` comes in. A finished run folder goes out. This is the one room that knows both the engines and the folder.
"""
