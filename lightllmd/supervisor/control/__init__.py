"""The control plane: HTTP on a Unix socket, the verbs that it offers, the jobs that they begin, the status page."""
