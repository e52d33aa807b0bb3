"""The command line: a dataclass for each command, whose fields are the flags and whose run() does the work."""
