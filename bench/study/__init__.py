"""``python bench/study`` compares byte-level models at equal training FLOPs."""
