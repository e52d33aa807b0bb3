"""What a benchmark can be asked: a dataclass per benchmark. Its fields are the flags of `slipstream bench`.

Nothing heavy is imported here: `slipstream bench --help` reads all of it.
"""
