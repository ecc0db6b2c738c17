"""How many nouns a pseudo label is made of. Imports no torch: the command line reads it. `pseudo_labels` follows the
rule.
"""

from dataclasses import dataclass

from hdovd.cache.identity import KeyInputs
from hdovd.core.errors import HdovdError

TEMPERATURE = 0.01  # of CLIP itself: its logits are 100 times the cosine, the most that its training allows


@dataclass(frozen=True, slots=True)
class LabelRule:
    """A label is made of the `top` nouns with the highest cosine, weighed by softmax(cosine / temperature). Raises
    HdovdError.
    """

    top: int = 1
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        if self.top < 1:
            raise HdovdError(f"--label-top-k {self.top}: expected 1 or more")
        if not 0 < self.temperature < float("inf"):
            raise HdovdError(f"--label-temperature {self.temperature}: expected a number above 0")

    def inputs(self) -> KeyInputs:
        """What the rule adds to the identity of labels: nothing for one noun, whose weight is 1 at any temperature."""
        return {} if self.top == 1 else {"top_k": self.top, "temperature": self.temperature}

    @classmethod
    def of(cls, inputs: KeyInputs) -> "LabelRule":
        """The rule of a pseudo_label product, by its key inputs."""
        return cls(int(inputs["top_k"]), float(inputs["temperature"])) if "top_k" in inputs else cls()


ONE_NOUN = LabelRule()
