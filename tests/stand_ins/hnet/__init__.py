"""A stand-in for goombalab/hnet, which is not on the package index.

Names and signatures are those of 3673fe1. What the functions compute is written one row at a time.
"""
