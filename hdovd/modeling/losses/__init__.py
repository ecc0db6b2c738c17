"""The losses of METHOD sections 4 to 6, a file a level, each a pure function of tensors."""
