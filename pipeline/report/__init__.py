"""Drawing, charts and the template of the report page."""
