"""`hdovd train`."""

from hdovd.cli.command import command
from hdovd.pipelines.training.config import TrainConfig


@command
def train(config: TrainConfig) -> None:
    """The three levels: --set loss.instance.enabled=false, loss.class.enabled=false, loss.image.enabled=false.
    CACHE may be hf://, s3:// or gs://. Several GPUs: torchrun --nproc-per-node 8 -m hdovd train ...; train.batch_size
    is that of all of them. Ctrl-C, SIGTERM and SIGUSR1 save and end, with exit code 130 or 75 (torchrun has codes of
    its own); --resume goes on to the sample. Next: hdovd eval OUT.
    """
    from hdovd.pipelines.training.train import train as run

    run(config)
