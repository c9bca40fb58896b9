"""From one configuration to the next: facts, plan, preflight, reload, and the switch between two revisions."""
