"""What a model is, without torch: the decoder's specification, the families as data, the list of weights."""
