"""How quantized modules lie in a file: tensors, names, shapes, and the config that describes them."""
