"""The modules of the stand-in."""
