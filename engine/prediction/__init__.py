"""Prediction from the command line: the predictor it asks for, the images, and the rows it writes."""
