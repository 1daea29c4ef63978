"""Looks for where a value that is not finite comes from, and counts what is skipped."""
