"""What `hdovd export` is asked for, and the forms of file that it writes. Imports no torch: a mistake shows before
that.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from hdovd.core import HdovdError, require_files
from hdovd.pipelines.common.options import ClipNames, Group, Option
from hdovd.pipelines.runs import ExampleOptions
from hdovd.pipelines.runs.folder import FILES


class ModelForm(StrEnum):
    """What `hdovd export` writes."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    SAFETENSORS = "safetensors"

    @classmethod
    def of(cls, file: Path, asked: "ModelForm | None") -> "ModelForm":
        """What the file's name says, or else what is `asked` for. Raises HdovdError if there is neither, or they do not
        agree.
        """
        said = ENDINGS.get(file.suffix.lower())
        if asked is None and said is None:
            raise HdovdError(f"--out {file}: give --format, or a name that ends in one of {', '.join(ENDINGS)}")
        if asked is not None and said is not None and said is not asked:
            raise HdovdError(
                f"--out {file} is named as {said.value}, and --format says {asked.value}: give a name that ends "
                f"otherwise"
            )
        return asked or said or cls.ONNX


ENDINGS = {
    ".onnx": ModelForm.ONNX,
    ".pt": ModelForm.TORCHSCRIPT,
    ".ts": ModelForm.TORCHSCRIPT,
    ".safetensors": ModelForm.SAFETENSORS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportModelConfig(ClipNames, ExampleOptions):
    """`check_images`: pictures to check the file on, besides those that are made up."""

    form: Annotated[
        ModelForm,
        Group(
            {
                "form": (
                    ModelForm | None,
                    None,
                    Option(
                        "onnx: for onnxruntime, written with hdovd's extra export; torchscript: for torch.jit.load, "
                        "with torchvision; safetensors: the "
                        "weights. Default: what the name of --out ends in, .onnx, .pt or .safetensors.",
                        flags=("--format",),
                    ),
                )
            },
            lambda given: ModelForm.of(given["out"], given["form"]),
        ),
    ]
    out: Annotated[Path, Option("The file to write.")]
    batch: Annotated[
        bool,
        Option(
            "Take a batch of pictures of one size, (n, 3, height, width), and give as many detections of each; of "
            "detectors without NMS."
        ),
    ] = False
    check_images: Annotated[
        tuple[Path, ...],
        Option("A picture to check the file on, besides those that are made up. Repeatable.", flags=("--check-image",)),
    ] = ()

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths alone."""
        ExampleOptions.check(self)
        if self.out.is_dir() or (self.out.name in FILES and self.out.resolve().parent == self.run.resolve()):
            raise HdovdError(
                f"--out {self.out} is {'a folder' if self.out.is_dir() else 'a file of the run itself'}: expected the "
                f"name of a new file, such as detector.{self.form.value}"
            )
        if self.batch and self.form is ModelForm.SAFETENSORS:
            raise HdovdError("--batch: a .safetensors file holds weights alone, which take any batch; leave it out")
        if not self.out.resolve().parent.is_dir():
            raise HdovdError(f"--out {self.out}: there is no folder {self.out.resolve().parent}")
        for picture in self.check_images:
            require_files(check_image=picture)
