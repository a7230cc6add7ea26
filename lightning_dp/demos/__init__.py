"""Small models and real data that need no download, for examples and configurations."""
