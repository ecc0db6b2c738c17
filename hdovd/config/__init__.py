"""Recipes: every value of a training run, validated. Text in, frozen pydantic models out."""
