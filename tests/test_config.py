import dataclasses
import json
from pathlib import Path

import pytest

from khala_mlx.config import (
    BackboneConfig,
    CodecConfig,
    KhalaConfig,
    SpecialTokens,
    SuperResConfig,
    TokenLayout,
    TransformerConfig,
)
from khala_mlx.errors import ConfigError


@pytest.mark.parametrize("config", [KhalaConfig(), KhalaConfig.tiny()], ids=["released", "tiny"])
def test_json_round_trip(config: KhalaConfig) -> None:
    assert KhalaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_released_sizes_are_those_of_the_paper() -> None:
    config = KhalaConfig()
    assert config.tokens.backbone_vocab == 130304
    assert config.tokens.superres_vocab == 193792
    assert config.codec.hop == 2048
    assert config.codec.frame_rate == pytest.approx(21.533, abs=1e-3)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        KhalaConfig().dtype = "float32"  # type: ignore[misc]


def edited(**changes: object) -> dict[str, object]:
    data = KhalaConfig.tiny().to_dict()
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = data
        for name in outer:
            target = target[name]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    return data


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"codec__hop": 1}, "unknown keys: hop"),
        ({"backbone": ...}, "is missing keys: backbone"),
        ({"backbone__num_layers": ...}, "is missing keys: num_layers"),
        ({"backbone": 3}, "must be an object"),
        ({"source": 3}, "must be an object"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"fc1_bias": "triple"}, "double or single"),
        ({"model_type": "llama"}, "model_type"),
        ({"format_version": 99}, "format 99"),
        ({"backbone__num_layers": 2.0}, "type int"),
        ({"backbone__num_layers": True}, "type int"),
        ({"backbone__num_layers": -1}, "above 0"),
        ({"backbone__norm_eps": float("nan")}, "type float"),
        ({"backbone__num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"backbone__head_dim": 7}, "even"),
        ({"backbone__max_prompt": 512}, "below context"),
        ({"backbone__vocab_size": 331}, "token layout has"),
        ({"superres__vocab_size": 331}, "token layout has"),
        ({"codec__codebook_size": 17}, "token layout has"),
        ({"codec__num_codebooks": 9}, "token layout has"),
        ({"codec__encoder_strides": 4}, "must be a list"),
        ({"codec__encoder_strides": [2, 3]}, "even numbers"),
        ({"codec__encoder_strides": [2, 4]}, "one hop"),
        ({"tokens__num_coarse": 8}, "num_coarse"),
        ({"tokens__end_of_song": 300}, "text id"),
        ({"tokens__marker_base": 3}, "text id"),
        ({"tokens__specials__minutes": "<m>"}, "{minutes}"),
        ({"quantization": {"backbone.lm_head": {"bits": 4}}}, "is missing keys"),
        ({"licence": 5}, "type str"),
    ],
)
def test_wrong_configs_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        KhalaConfig.from_dict(edited(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone__\x1b[2J\n": 1},
        {"backbone__num_layers": "\n" * 10**6},
        {"quantization": {"backbone\n": {"bits": 4}}},
    ],
)
def test_hostile_texts_are_shown_on_one_line(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        KhalaConfig.from_dict(edited(**changes))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_whole_numbers_serve_as_floats() -> None:
    config = KhalaConfig.from_dict(edited(backbone__rope_base=10000))
    assert config.backbone.rope_base == 10000.0


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.json cannot be read"):
        KhalaConfig.load(tmp_path / "absent.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        KhalaConfig.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="object"):
        KhalaConfig.load(tmp_path / "config.json")


def test_every_part_has_a_tiny_form() -> None:
    assert BackboneConfig.tiny().vocab_size == TokenLayout.tiny().backbone_vocab
    assert SuperResConfig.tiny().vocab_size == TokenLayout.tiny().superres_vocab
    assert CodecConfig.tiny().hop == 128
    assert SpecialTokens().minutes.format(minutes=3) == "<|reserved_special_token_3|>"
    assert issubclass(BackboneConfig, TransformerConfig)


def test_hostile_keys_stay_on_one_short_line() -> None:
    for keys in ({"a\n\x1b[2J": 1}, {"k" * 10**6: 1}):
        with pytest.raises(ConfigError) as error:
            KhalaConfig.from_dict(keys, "config.json")
        assert "\n" not in str(error.value)
        assert "\x1b" not in str(error.value)
        assert len(str(error.value)) < 300
