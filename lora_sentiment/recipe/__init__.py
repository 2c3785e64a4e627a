"""What a user writes: the sections of a recipe, the YAML reader and the JSON schema."""

from lora_sentiment.recipe.recipe import Recipe as Recipe
from lora_sentiment.recipe.recipe import make_schema as make_schema
