"""The engine: scheduler, slots, runner and sampler of one rank."""
