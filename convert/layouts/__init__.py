"""How each published checkpoint names and shapes its tensors."""
