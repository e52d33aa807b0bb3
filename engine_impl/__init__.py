"""The engine: prefill, insert and generate over a stacked KV cache."""
