"""Images of requests, on their way to the visual worker."""
