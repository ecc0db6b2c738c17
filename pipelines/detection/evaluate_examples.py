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
    RUN/examples/NAME-MIX. Raises HdovdError for bad input, for examples of other classes than the protocol's, and
    where results of other examples of that name lie.
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
    out = run.path / "examples" / f"{source.absolute().name.removesuffix('.json')}-{job.mix:g}"
    about = {"examples": str(source.absolute()), "mix": job.mix, "classes": list(examples.names)}
    about["weights"] = str(job.weights)
    told = out / "examples.json"
    if told.exists() and (was := json.loads(told.read_text())) | about != was:
        raise HdovdError(
            f"{out} holds results of {was['examples']} ({was.get('weights', 'last')} weights): move it away"
        )
    rows = [place[folded(name)] for name in examples.names]
    others = [row for row in range(len(texts)) if row not in rows]
    detector = Detector.from_run(
        job.run, weights=job.weights, device=job.device, clip=job.clip, pretrained=job.pretrained, trust=job.trust
    )
    texts[rows] = detector.example_rows(examples, job.mix, texts[others])
    del detector  # and CLIP
    result = evaluate_by(job, protocol, texts, out)
    write_text(told, json.dumps(about, indent=1))
    result.files.append(told)
    return result
