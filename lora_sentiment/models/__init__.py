"""Load a base model, quantise it, wrap it with PEFT, count it, and run it."""
