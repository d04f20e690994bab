"""Pictures, charts, wording and template of the report page."""
