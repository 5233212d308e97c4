"""A byte-level tokenizer for TokenLayout.tiny(): 256 bytes, no merges, 44 special tokens."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from khala_mlx.config import TokenLayout

# In id order from 256: the ids that TokenLayout.tiny() names, then those a prompt is built from.
NAMED = ("begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id",
         "end_header_id", "eom_id", "eot_id", "python_tag")  # fmt: skip


def write_tiny_tokenizer(path: Path) -> Path:
    """Write a tokenizer.json to `path`; the superres markers 292..297 are reserved names.

    The reserved names start at 1, so minutes 1..10 have the ids 264..273.
    """
    layout = TokenLayout.tiny()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: id for id, character in enumerate(alphabet)}
    names = [f"<|{name}|>" for name in NAMED]
    spare = layout.audio_start - len(alphabet) - len(names)
    names += [f"<|reserved_special_token_{number}|>" for number in range(1, spare + 1)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.save(str(path))
    return path
