"""ONNX export: the specification evaluated on symbols."""
