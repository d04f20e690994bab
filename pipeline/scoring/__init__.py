"""From predictions and true masks to metrics; see `ScoreBoard`.

A benchmark is scored in one pass over its examples and the prediction shards; what stays in memory
are counts, and a few bytes a predicted object.
"""
