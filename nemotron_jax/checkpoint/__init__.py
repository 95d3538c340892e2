"""All that lies on disk of a model."""
