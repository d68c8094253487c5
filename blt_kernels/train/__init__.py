"""Training and evaluation on files; needs the packages of the extra ``train``."""
