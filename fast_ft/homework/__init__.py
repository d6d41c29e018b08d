"""Handing a run in under the homework's rules: checks, the zip, doing a run again from a zip, the ledger of attempts.

A finished run folder or a zip comes in. A zip, or a list of what differs, goes out.
"""
