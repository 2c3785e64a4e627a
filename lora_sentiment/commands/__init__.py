"""One file for each verb of the command line that is more than one call."""
