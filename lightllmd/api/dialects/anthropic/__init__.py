"""Anthropic's Messages API: POST /v1/messages, /v1/messages/count_tokens, and its form of GET /v1/models."""
