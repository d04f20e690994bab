"""Scores: functions and classes on arrays, which read no files and know no benchmark."""
