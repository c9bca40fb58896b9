"""The page at /: the daemon's state as HTML and as JSON, the files of its chat, and who gets what of them."""
