"""The command line's commands: a dataclass each, whose fields are the flags and whose run() does the work."""
