"""Which slots of the KV cache belong to which sequence or cached prefix. Pure Python and numpy, no torch."""
