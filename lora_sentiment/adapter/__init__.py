"""The adapter folder: save, load, verify, merge, export, and model cards."""
