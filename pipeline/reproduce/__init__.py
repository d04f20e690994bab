"""The papers' tables made again: what a row needs, the commands that make it, the difference."""
