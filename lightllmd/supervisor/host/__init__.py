"""What the host offers: listeners, systemd, runtime directory, /proc, reaping, threads that read files."""
