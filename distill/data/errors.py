"""What is wrong with somebody's data."""

from distill.config import RecipeError


class DataError(RecipeError):
    """Prompts or pictures that cannot be used; the message names the file, what was found there and the way out."""
