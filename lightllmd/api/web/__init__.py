"""What all routes share: reading bodies, answering, errors, API keys."""
