"""Training of the codec on tiny tones, and the losses and codebooks behind it."""

from pathlib import Path
from typing import Any

import pytest

from khala_mlx.errors import ConfigError
from khala_mlx.train.settings import CodecTraining


def test_wrong_settings_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path: Any = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        CodecTraining.from_file(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        CodecTraining.from_file(tmp_path / "absent.json")
