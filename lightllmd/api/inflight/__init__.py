"""Requests in flight: the gate before them, the ledger that outlives engines, and the answers that wait for them."""
