"""Writes the plain loop that a configuration is, from small pieces of text."""
