"""Fuzzing of the loaders of files and of the ops: see `__main__`."""
