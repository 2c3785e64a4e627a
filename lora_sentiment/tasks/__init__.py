"""What a label is. One file for each task; `metrics.py` scores the answers."""
