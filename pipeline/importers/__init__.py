"""What others have computed, read into our tables: archives and image embeddings."""
