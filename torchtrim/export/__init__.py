"""Ship a model: ONNX files that have been run and compared."""
