"""Passes that every dialect is lowered with."""
