"""The demo's tokenizer: bytes, the corpus's words as single tokens, and the control tokens.

python tokenizer.py tokenizer.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from corpus import SYLLABLES, TAGS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from khala_mlx.config import TokenLayout
from khala_mlx.prompt.tokenizer import prompt_specials

# Bytes, words and control tokens come first, the 62 markers of superres last.
LAYOUT = TokenLayout(
    audio_start=448,
    codebook_size=256,
    num_codebooks=64,
    num_coarse=2,
    end_of_song=380,
    padding=381,
    marker_base=447,
)
_SPARE = ("<|end_of_song|>", "<|padding|>")


def make() -> Tokenizer:
    """A byte-level BPE whose merges are learnt from the corpus's vocabulary alone."""
    tokenizer = Tokenizer(models.BPE())
    # Words stand apart from spaces, so that a syllable is one token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+|[^\p{L}\p{N}]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LAYOUT.audio_start,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SYLLABLES, *TAGS], trainer)
    words = tokenizer.get_vocab_size()
    names = prompt_specials(LAYOUT)
    fill = LAYOUT.end_of_song - words - len(names)
    assert fill >= 0
    unused = [f"<|unused_{number}|>" for number in range(fill)]
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in (*names, *unused, *_SPARE)]
    )
    return tokenizer


if __name__ == "__main__":
    make().save(str(Path(sys.argv[1])))
