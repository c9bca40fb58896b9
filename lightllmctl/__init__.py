"""lightllmctl: asks and commands a lightllmd daemon over its control socket."""
