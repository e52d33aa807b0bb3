"""Programs without a device: what fits, what the compiler makes of it."""
