"""What a label is: loss, probabilities, metrics and calibration."""
