"""What is kept of what happened: log lines, events, output of children, numbered reports."""
