"""What runs in the next step: admission, queues, beam search, restrictions. Pure Python, no torch."""
