"""A model in the files that other programs run: ONNX graphs and the folders of their clients."""
