"""The folder that a run lies in: how a new one is made, and the licences of what is in it."""
