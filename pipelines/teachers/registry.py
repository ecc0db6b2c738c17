"""The kinds of teachers that a command can name: open_clip's models, and a user's own. Imports no torch."""

from hdovd.core.registry import Registry

OPEN_CLIP = "open_clip"
# Functions that take what `openclip.load_clip` takes, and return a `base.Teacher`.
TEACHERS = Registry("--teacher", {OPEN_CLIP: "hdovd.pipelines.teachers.openclip:load_clip"})
