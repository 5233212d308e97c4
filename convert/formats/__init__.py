"""File formats of foreign checkpoints, read without executing anything in them."""
