"""What runs in the next step: admission, queues, beam search, constraints. Pure Python, no torch."""
