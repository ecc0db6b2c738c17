"""What a search finds."""

from dataclasses import dataclass

from hdovd.pipelines.search.config import Box


@dataclass(frozen=True, slots=True)
class Hit:
    """A box that was found. `row`: its number within its image, from 0; None: the picture itself. `box`: xyxy, pixels
    of the original image. `name`: class or noun; empty if it has none, or the annotations were not read. `cosine`: with
    the query, the text of its own class, the mean of its class, or `other`. `other`: the class that it speaks for, and
    `other_cosine` with its text; or the other one of a pair, as `place`.
    """

    image_id: int
    row: int | None
    box: Box
    source: str
    name: str
    score: float | None
    cosine: float
    other: str = ""
    other_cosine: float | None = None

    @property
    def place(self) -> str:
        """What `--like` takes; of a picture its id."""
        return str(self.image_id) if self.row is None else f"{self.image_id}:{self.row}"
