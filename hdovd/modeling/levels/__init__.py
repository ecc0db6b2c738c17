"""The three levels of distillation as parts of the detector, a file a level: what each keeps between steps, and its
losses.

A part sees the detector through a `StepContext` and returns weighted losses by name; the losses themselves are the
pure functions of `hdovd.modeling.losses`.
"""
