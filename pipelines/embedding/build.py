"""The embedders of an extraction, as its crop recipe asks for them."""

from hdovd.cache.schema import Level
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, DenseRecipe
from hdovd.pipelines.embedding.embedders import Crops, Embedder, Pictures, WholePictures
from hdovd.pipelines.teachers.base import Teacher


def embedders_of(teacher: Teacher, pictures: Pictures, recipe: CropRecipe | DenseRecipe) -> dict[Level, Embedder]:
    """Of the image and the instance level. Raises HdovdError for a dense recipe if the model has no dense features."""
    whole = WholePictures(teacher, pictures)
    if isinstance(recipe, CropRecipe):
        return {Level.IMAGE: whole, Level.INSTANCE: Crops(teacher, pictures, recipe)}
    from hdovd.pipelines.embedding.dense import DenseBoxes

    return {Level.IMAGE: whole, Level.INSTANCE: DenseBoxes(teacher, pictures, recipe.side)}
