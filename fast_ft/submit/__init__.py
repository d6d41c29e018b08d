"""Handing a run in under the homework's rules, doing it again elsewhere, and the ledger of attempts."""
