"""A GGUF file as a checkpoint: header, blocks, config, tokenizer."""
