"""Agreement with the published systems: `python -m tests.reference DIR` runs every case of DIR.

A folder of vectors holds, for each NAME, `NAME.json` (settings and scalars), `NAME.io.safetensors`
(inputs and outputs) and, for networks, `NAME.weights.safetensors`. What a family of cases expects
is read from these files alone, so vectors of other sizes, seeds and settings run as well.
"""
