"""A folder in, and the COCO instances file and the image folder of each of its splits out: forms of data sets."""
