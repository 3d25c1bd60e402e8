"""Running the engines of a bundle with TensorRT or TensorRT-RTX."""
