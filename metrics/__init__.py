"""Scores of answers and captions: strings in, numbers out."""
