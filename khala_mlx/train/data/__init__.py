"""Songs of a folder as training data."""
