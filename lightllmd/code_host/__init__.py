"""The processes that run a checkpoint's own code. Nothing imports this: it is started by `remote_code`."""
