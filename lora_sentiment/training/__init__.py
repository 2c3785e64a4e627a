"""The optimizer steps."""
