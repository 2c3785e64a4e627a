"""The base, what is trained of it, and its forward."""
