"""`hdovd transfer`: a run and data sets that it was not trained on in, AP by their class names out."""
