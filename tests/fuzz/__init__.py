"""Calls with extreme arguments, and damaged files: ``python -m fuzz`` runs them for long, tests for seconds."""
