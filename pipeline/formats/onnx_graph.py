"""Inputs and outputs of a student in an ONNX file: their names and axes.

images            (batch, 3, height, width) RGB in [0, 1], float32
text              (labels, C) unit rows by label id, the background's first; where text is an input
threshold         scalar: probability above which a token belongs to a proposal
temperature       scalar: factor of the cosine in a score
semantic_logits   (batch, labels, rows, columns) on the token grid, by label id
proposals         (batch, queries, rows, columns) probabilities of a mask
similarities      (batch, queries, labels) cosine of what is inside a proposal with each name
scores            (batch, queries) of a proposal with its best name

All inputs but `images` have defaults. A student that finds no objects has `semantic_logits` alone,
and neither threshold nor temperature.
"""

IMAGES, TEXT, THRESHOLD, TEMPERATURE = "images", "text", "threshold", "temperature"
SEMANTIC_LOGITS, PROPOSALS = "semantic_logits", "proposals"
SIMILARITIES, SCORES = "similarities", "scores"
LABELS = "labels"  # an axis whose length may change only where text is an input

SEMANTIC_OUTPUTS = {SEMANTIC_LOGITS: ("batch", LABELS, "rows", "columns")}
OBJECT_OUTPUTS = {
    **SEMANTIC_OUTPUTS,
    PROPOSALS: ("batch", "queries", "rows", "columns"),
    SIMILARITIES: ("batch", "queries", LABELS),
    SCORES: ("batch", "queries"),
}
