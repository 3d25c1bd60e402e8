"""LoRA adapters: read from peft's folders, merged into weights, or written beside them."""
