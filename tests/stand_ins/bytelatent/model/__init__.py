"""The parts of a BLT."""
