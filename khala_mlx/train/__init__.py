"""Training: the codec, the backbone and superres, as the paper describes it."""
