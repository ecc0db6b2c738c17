"""Run folders: written by training, listed, compared, and read by all that comes after."""

from hdovd.pipelines.runs.config import DEFAULT_MIX, ExampleOptions, ImportCheckpointConfig, RunOptions
from hdovd.pipelines.runs.folder import UPPER_BOUND, RunFolder, Weights, init_hash, weights_hash
from hdovd.pipelines.runs.listing import ORACLE, Run, ap, read_run, table_groups, table_lines
from hdovd.pipelines.runs.trackers import PLAIN, TrackOptions, tracking

__all__ = [
    "DEFAULT_MIX",
    "ORACLE",
    "PLAIN",
    "UPPER_BOUND",
    "ExampleOptions",
    "ImportCheckpointConfig",
    "Run",
    "RunFolder",
    "RunOptions",
    "TrackOptions",
    "Weights",
    "ap",
    "init_hash",
    "read_run",
    "table_groups",
    "table_lines",
    "tracking",
    "weights_hash",
]
