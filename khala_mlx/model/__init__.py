"""The three models in MLX, and what they are built of."""
