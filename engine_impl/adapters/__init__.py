"""LoRA adapters: folders that hold them, the pass over a model, their arrays on the devices."""
