"""A tiny training of a codec."""

from khala_mlx.config import CodecConfig
from khala_mlx.train.settings import CodecTraining, Schedule

TINY = CodecTraining(
    codec=CodecConfig(
        encoder_dim=4, encoder_strides=(4, 4, 8), decoder_dim=4, decoder_rates=(8, 4, 4),
        latent_dim=16, num_codebooks=8, codebook_size=16,
    ),
    schedule=Schedule(
        steps=14, batch_size=2, learning_rate=2e-3, warmup=2, clip_norm=10.0,
        checkpoint_every=4, validate_every=7,
    ),
    crop_frames=32, quantise_after=5, trained_layers=4, layer_choices=(0, 1, 2, 4),
    fit_frames=600,
)  # fmt: skip
