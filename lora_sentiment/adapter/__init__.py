"""The folder that leaves a run."""
