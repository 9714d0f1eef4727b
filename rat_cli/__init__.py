"""The commands behind cli.py. Nothing is imported here, so that each command loads only what it needs."""
