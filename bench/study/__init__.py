"""Byte-level models at equal training FLOPs: ``python bench/study``."""
