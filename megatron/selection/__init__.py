"""Choosing documents before training, under a compute budget.

A selector scores every document of a corpus against target texts; a part of the documents is then
taken by score.  Scores are a table of their own, so that one scoring serves many choices.
"""
