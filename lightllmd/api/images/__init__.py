"""The api worker's way to the visual worker."""
