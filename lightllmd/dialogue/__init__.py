"""What a model says beyond text: its reasoning and calls of tools, in the formats of its chat template."""
