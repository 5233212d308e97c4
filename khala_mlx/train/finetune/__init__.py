"""LoRA adapters for the backbone: training, evaluation, forecasts."""
