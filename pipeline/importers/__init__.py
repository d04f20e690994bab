"""What others have computed or annotated, read into our tables and layouts."""
