"""OpenAI's completions and chat completions, and what other dialects share of them."""
