"""`hdovd export-labels`."""

from hdovd.cli.command import command
from hdovd.pipelines.label_export.config import ExportLabelsConfig


@command
def export_labels(config: ExportLabelsConfig) -> None:
    """fiftyone: labels.json, a FiftyOneImageDetectionDataset. label-studio: tasks.json, with predictions, and
    labels.xml, the labelling configuration. cvat: annotations.xml, "CVAT for images 1.1", and labels.json, the raw
    labels of a task. yolo: data.yaml, labels/, images/, links, and predictions/, labels with scores. coco:
    instances.json, with scores.

    Pictures are those of hdovd detect, by its images.json; of a cache, of its data; or of --data, its training pictures
    for a search, its validation pictures for hdovd eval. What is corrected there is a data set again: docs/DATA.md.
    """
    from hdovd.pipelines.label_export.export import export_labels as run

    run(config)
