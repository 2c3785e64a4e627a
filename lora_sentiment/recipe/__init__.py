"""What a user writes: one file for each section of a recipe, the YAML reader and the JSON schema."""
