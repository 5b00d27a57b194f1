"""What runs after a fit: packed files, integers, ONNX. Nothing is imported unless it is used."""
