"""What model and device are like, read by a short-lived child: headers, settings, tokenizer. No weights, no torch."""
