"""`hdovd adapt`: a run and labelled pictures of the user's own in, a run that finds their classes too out; and what
became of the classes that the run knew.
"""
