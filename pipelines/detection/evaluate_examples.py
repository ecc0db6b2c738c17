"""`hdovd eval --examples`: a run's AP where examples stand for its classes, or beside their names."""

import json
from pathlib import Path

from hdovd.core.errors import HdovdError, shorten
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.detection.examples import read_examples
from hdovd.pipelines.evaluation.config import EvalConfig
from hdovd.pipelines.evaluation.evaluate import EvalResult, evaluate_by
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.teachers.prompts import folded


def evaluate_examples(job: EvalConfig, source: Path) -> EvalResult:
    """Evaluate a run by its protocol, with the rows of the examples `source` for the classes that have any; files go to
    RUN/examples/NAME-MIX. Raises HdovdError for bad input, and for examples of other classes than the protocol's.
    """
    job.check()
    run, examples = RunFolder(job.run, job.trust), read_examples(source, job.example_images)
    protocol, texts = run.protocol(), run.class_embeddings().float()
    place = {folded(name): label for label, name in enumerate(protocol.names)}
    if strange := [name for name in examples.names if folded(name) not in place]:
        raise HdovdError(
            f"--examples {source}: no classes of protocol {protocol.name}: {shorten(list(strange))}; hdovd "
            f"detect looks for any"
        )
    rows = [place[folded(name)] for name in examples.names]
    others = [row for row in range(len(texts)) if row not in rows]
    detector = Detector.from_run(job.run, weights=job.weights, device=job.device, trust=job.trust)
    texts[rows] = detector.example_rows(examples, job.mix, texts[others])
    del detector  # and CLIP
    out = run.path / "examples" / f"{source.absolute().stem}-{job.mix:g}"
    result = evaluate_by(job, protocol, texts, out)
    about = {"examples": str(source.absolute()), "mix": job.mix, "classes": list(examples.names)}
    write_text(out / "examples.json", json.dumps(about, indent=1))
    result.files.append(out / "examples.json")
    return result
