"""The one decoder, built from a specification and the weights that follow from it."""
