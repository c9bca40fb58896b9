"""The HTTP front end: routes, server-sent events and the ledger of requests in flight."""
