"""The commands in the order of the help: what each says of itself, the function that it calls, and the config that its
options make.

Both are named as `module:name`, and imported when the command is asked for: the config for its help and its mistakes,
and the function, with all that it needs, once the config is found right.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """`help`: its first paragraph stands in the help of `hdovd` too. `run`: a function of the config; of a group of
    commands its app, and no config.
    """

    help: str
    run: str
    config: str = ""


COMMANDS = {
    "demo": Command(
        """Run the main job on a small drawn world: propose, extract-clip, train (base-only and distilled), eval,
        report.

        Prints every command before it runs, so that you can repeat it by hand. Minutes on two CPU cores.
        """,
        "hdovd.cli.answers:demo",
        "hdovd.pipelines.demo.config:DemoConfig",
    ),
    "propose": Command(
        """Train a class-agnostic proposal network on base boxes, and write proposals for the training images.

        The recipe gives backbone, input size, schedule and the section [proposals]. The same command goes on where a
        killed one was, and takes a network that is there already with the same settings. Several GPUs: torchrun
        --nproc-per-node 8 -m hdovd propose ... Side by side: hdovd propose --report --detector rpn --detector oln.
        Next: hdovd extract-clip --proposals OUT.
        """,
        "hdovd.cli.answers:propose",
        "hdovd.pipelines.proposals.config:ProposeConfig",
    ),
    "nouns": Command(
        """Find the nouns in each image's captions: what its pseudo boxes may be named.

        Says how many there are, which words of the captions the vocabulary lacks, and which novel names it holds and
        how often. See docs/NOUNS.md. Next: hdovd extract-clip --nouns OUT.
        """,
        "hdovd.pipelines.nouns.find:find_nouns",
        "hdovd.pipelines.nouns.config:NounsConfig",
    ),
    "extract-clip": Command(
        """Run the frozen CLIP once and fill the cache: class names, nouns, images, base boxes and proposals.

        Prints first, level by level, whether the cache has it (hit), some of it (extend) or nothing (extract), and what
        that costs. Killed? The same command goes on where it was. Needs no GPU, but wants one. Next: hdovd train
        --cache CACHE.
        """,
        "hdovd.pipelines.extraction.extract_clip:extract_clip",
        "hdovd.pipelines.extraction.config:ExtractConfig",
    ),
    "calibrate": Command(
        """Say and draw how far pseudo labels are trusted, and what to expect of them, before training.

        What to expect of a cache's pseudo labels before training, from base boxes and base names alone, and the weight
        that follows, which training takes by itself where METHOD has none for the CLIP. CLIP is not needed. The cache
        knows where its data and nouns are; --data and --protocol say it anew. For another cache made in the same way:
        hdovd train --calibration FILE.
        """,
        "hdovd.pipelines.calibration.calibrate:calibrate",
        "hdovd.pipelines.calibration.config:CalibrateConfig",
    ),
    "relabel": Command(
        """The next round: a trained detector proposes and names the pseudo boxes of a new set of the cache.

        The run's detector looks for all nouns on the training images; what it finds besides base boxes are the new
        pseudo boxes, among them the likeliest for each noun that an image's captions hold, named by it and CLIP
        together. They become a new set of the cache that the run was trained from, which the next run trains from. No
        novel annotation is read: hdovd audit says so. Needs the CLIP, and wants a GPU. The same command goes on where a
        killed one was.
        """,
        "hdovd.pipelines.relabelling.relabel:relabel",
        "hdovd.pipelines.relabelling.config:RelabelConfig",
    ),
    "train": Command(
        """Train a detector from the cache; CLIP is not needed. --set overrides any value of the recipe.

        The three levels: --set loss.instance.enabled=false, loss.class.enabled=false, loss.image.enabled=false. CACHE
        may be hf://, s3:// or gs://. Several GPUs: torchrun --nproc-per-node 8 -m hdovd train ...; train.batch_size is
        that of all of them. Ctrl-C, SIGTERM and SIGUSR1 save and end, with exit code 130 or 75 (torchrun has codes of
        its own); --resume goes on to the sample. Next: hdovd eval OUT.
        """,
        "hdovd.pipelines.training.train:train",
        "hdovd.pipelines.training.config:TrainConfig",
    ),
    "adapt": Command(
        """Train a run on pictures of new classes, so that it still finds those that it knew; a table says what became
        of them.

        Classes that RUN knows are kept: docs/ADAPT.md says how. Several GPUs and --resume as for hdovd train. Next:
        hdovd eval OUT --before RUN, hdovd detect OUT.
        """,
        "hdovd.pipelines.adaptation.adapt:adapt",
        "hdovd.pipelines.adaptation.config:AdaptConfig",
    ),
    "eval": Command(
        """Detect on the validation images and print OV-COCO AP: novel, base, all, and split-blind beside it.

        Writes metrics.json and detections.json (COCO results form) into RUN; with --examples into RUN/examples, see
        docs/DETECT.md; with --before retention.json.
        """,
        "hdovd.cli.answers:eval",
        "hdovd.pipelines.evaluation.config:EvalConfig",
    ),
    "transfer": Command(
        """Evaluate a run on data sets that it was not trained on, by their class names: a table of AP.

        No class is called base, and all are scored alike. Names are embedded by the text tower of the run's CLIP, once:
        they are kept in ~/.cache/hdovd. Results of each data set go to RUN/transfer/NAME.
        """,
        "hdovd.pipelines.transfer.transfer:transfer",
        "hdovd.pipelines.transfer.config:TransferConfig",
    ),
    "search": Command(
        """Find the boxes of a cache that are most like words, pictures or other boxes; or near-duplicates and doubtful
        labels.

        Several parts of a query add up, each with its weight: hdovd search CACHE "umbrella" "red=0.5" --not "rain".
        Words and pictures are embedded by the set's own CLIP; --like and --embeddings need none. Every box is compared,
        unless --index is given. The data are those of the extraction unless they are given. See docs/SEARCH.md.
        """,
        "hdovd.cli.answers:search",
        "hdovd.pipelines.search.config:SearchConfig",
    ),
    "detect": Command(
        """Find anything that has a name in any pictures and videos.

        Names that are no classes of the run are embedded by the text tower of its CLIP, once: they are kept in
        ~/.cache/hdovd. What cannot be read is skipped and listed; the exit code is 1 if nothing could be read. Ctrl-C
        ends a stream, and what was seen of it is whole. Videos need pip install "hdovd[video]". See docs/DETECT.md.
        """,
        "hdovd.cli.answers:detect",
        "hdovd.pipelines.detection.config:DetectConfig",
    ),
    "serve": Command(
        """Find and search in a browser: a page for pictures, names, examples and the boxes of a cache.

        With --run: drop pictures, type names or show examples, see boxes. With --cache: search it by words, or by a box
        drawn on a picture. The page asks for nothing elsewhere. Without a password: keep to 127.0.0.1, or know who
        reaches --host. Needs pip install "hdovd[serve]". See docs/SERVE.md.
        """,
        "hdovd.pipelines.serve.serve:serve",
        "hdovd.pipelines.serve.config:ServeConfig",
    ),
    "export": Command(
        """Write the detector to one file for other programs: picture and class embeddings in, detections out.

        The file holds the run's class names and embeddings too. It is run before it gets its name, and refused if it
        does not find what the model finds: scores to 1e-3, boxes to 1e-3 percent of the long side of the detector's
        input, to which any picture is resized.
        """,
        "hdovd.pipelines.export.model:export_model",
        "hdovd.pipelines.export.config:ExportModelConfig",
    ),
    "export-labels": Command(
        """Write detections, pseudo boxes or doubtful labels for FiftyOne, Label Studio, CVAT, YOLO or COCO tools.

        fiftyone: labels.json, a FiftyOneImageDetectionDataset. label-studio: tasks.json, with predictions, and
        labels.xml, the labelling configuration. cvat: annotations.xml, "CVAT for images 1.1", and labels.json, the raw
        labels of a task. yolo: data.yaml, labels/, images/, links, and predictions/, labels with scores. coco:
        instances.json, with scores.

        Pictures are those of hdovd detect, by its images.json; of a cache, of its data; or of --data, its training
        pictures for a search, its validation pictures for hdovd eval. What is corrected there is a data set again:
        docs/DATA.md.
        """,
        "hdovd.pipelines.label_export.export:export_labels",
        "hdovd.pipelines.label_export.config:ExportLabelsConfig",
    ),
    "import-checkpoint": Command(
        """Make a run folder of the authors' published weights, for eval, detect, export and report.

        Every tensor of the file is used or named, and nothing of it is run: a file of anything but tensors is refused.
        """,
        "hdovd.pipelines.runs.import_checkpoint:import_checkpoint",
        "hdovd.pipelines.runs.config:ImportCheckpointConfig",
    ),
    "ablate": Command(
        """Train and evaluate every cell of a grid with several seeds over one cache; write table.md, table.csv and
        table.tex.

        --grid loss.instance.enabled=true,false loss.class.enabled=true,false are four cells. The same command skips
        what is done and goes on with what was stopped or failed; another config in a run's folder is an error. Ctrl-C,
        SIGTERM and SIGUSR1 let the runs save and end (exit code 130 or 75). Exit code 1 if a run failed. Runs are not
        validated between epochs. --oracle adds the measure: the percentage of the novel gap, from base-only to the
        oracle, that each cell closes. Look on: hdovd runs OUT.
        """,
        "hdovd.cli.answers:ablate",
        "hdovd.pipelines.ablation.config:AblateConfig",
    ),
    "report": Command(
        """Write one HTML page about a run, or several side by side: it needs no network and no other file.

        AP by run and class, precision and recall, errors by kind, confusion, reliability of scores, losses by level,
        validation images with truth and detections, pseudo boxes with their nouns and weights, relations of teacher and
        student, time and identity.

        The pictures are taken from --data; --images and --annotations name other validation images. Without any, from
        where the runs' cache was made.
        """,
        "hdovd.pipelines.report.report:report",
        "hdovd.pipelines.report.config:ReportConfig",
    ),
    "audit": Command(
        """Check that nothing learned from novel annotations or from test pictures; exit with 1 on a leak.

        Compares the cache, and a run, with the raw annotation files. Each check ends as ok, LEAK, or unknown (it could
        not be made); report lines are disclosures, such as which novel names the nouns hold, and no leaks. See
        docs/AUDIT.md.
        """,
        "hdovd.cli.answers:audit",
        "hdovd.pipelines.audit.config:AuditConfig",
    ),
    "push": Command(
        """Put a run or a cache on the Hugging Face Hub, with a card that tells what it is.

        Runs become models, caches data sets. Every command that reads a run or a cache then takes hf://USER/NAME, or
        hf://USER/NAME@REVISION, pulls it once, and checks it. Needs pip install "hdovd[hub]", and hf auth login or
        HF_TOKEN.

        Of a run what is needed to use it is pushed: no checkpoint.pt, which is a pickle. A cache is checked first, as
        by hdovd cache verify. See docs/HUB.md.
        """,
        "hdovd.pipelines.hub.push:push",
        "hdovd.pipelines.hub.config:PushConfig",
    ),
    "cache": Command("Look into a feature cache, check it, mend it, tidy it.", "hdovd.cli.cache:app"),
    "runs": Command("List runs as a table, or tell what differs between two.", "hdovd.cli.groups:runs_app"),
    "proposals": Command("Convert proposal files and look into them.", "hdovd.cli.groups:proposals_app"),
    "bench": Command(
        "Measure on this machine, on made-up data, what an extraction will cost.", "hdovd.cli.groups:bench_app"
    ),
}
