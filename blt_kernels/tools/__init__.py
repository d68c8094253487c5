"""Training and evaluation on files."""
