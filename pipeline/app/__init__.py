"""`pipeline app`: look at a workspace in the browser, and decide what is to be left out.

One process, offline. Each view is a file: what it reads, and its routes. `data/review/*.csv` is all
that is ever written.
"""
