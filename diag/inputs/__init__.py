"""What models are shown: images and texts, from files, tars, data sets or Python objects. Knows no model."""
