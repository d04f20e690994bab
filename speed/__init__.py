"""Our pipeline beside a plain reading of the published method, on the same inputs.

Each module holds the rows of one component: `published`, straightforward code of our own that does
what the papers and their code describe, step by step; `ours`, a call of the pipeline; and a check
that both give the same result. `python -m speed` times them in turns.
"""
