"""From logits to tokens and log-probabilities: one sampler for each device."""
