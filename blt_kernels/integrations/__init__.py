"""Integrations put the ops under the models of other code bases, in place, and take them out again."""
