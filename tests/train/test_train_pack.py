"""`khala train pack`: three finished runs become one model folder, or one clear sentence."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result
from mlx.utils import tree_flatten
from tiny_tokenizer import write_tiny_tokenizer

from khala_mlx import Khala
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert, pack
from khala_mlx.errors import KhalaError
from khala_mlx.model.backbone import Backbone
from khala_mlx.model.codec import Codec
from khala_mlx.model.superres import SuperRes
from khala_mlx.train.loop import save_part

CONFIG = KhalaConfig.tiny()
PARTS = ("codec", "backbone", "superres")


def write_run(folder: Path, part: str, config: KhalaConfig = CONFIG) -> None:
    """What a run of this part leaves behind when it is done, with random weights."""
    folder.mkdir(parents=True)
    if part == "codec":
        save_part(folder, part, Codec(config.codec), config.codec)
    elif part == "backbone":
        model = Backbone(config.backbone, config.tokens)
        save_part(folder, part, model, config.backbone, config.tokens)
    else:
        model = SuperRes(config.superres, config.tokens)
        save_part(folder, part, model, config.superres, config.tokens)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    mx.random.seed(0)
    for part in PARTS:
        write_run(root / part, part)
    write_tiny_tokenizer(root / "tokenizer.json")
    return root


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """Runs that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def sources(root: Path) -> dict[str, Any]:
    return {name: root / name for name in PARTS} | {"tokenizer": root / "tokenizer.json"}


def command(root: Path, destination: Path, *more: str) -> Result:
    options = [text for name, path in sources(root).items() for text in (f"--{name}", str(path))]
    return CliRunner().invoke(main, ["train", "pack", str(destination), *options, *more])


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_packed_model_is_the_trained_one_and_sings(finished: Path, tmp_path: Path) -> None:
    result = command(finished, tmp_path / "model")
    assert result.exit_code == 0, result.stderr
    assert "0.04 M parameters" in result.stdout
    assert "Warning" not in result.stderr
    names = {path.name for path in (tmp_path / "model").iterdir()}
    weights = {f"{part}.safetensors" for part in PARTS}
    assert names == weights | {
        "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"
    }  # fmt: skip
    khala = Khala.from_pretrained(tmp_path / "model")
    for part in PARTS:
        trained = mx.load(str(finished / part / f"{part}.safetensors"))
        loaded = dict(tree_flatten(getattr(khala, part).parameters()))
        assert loaded.keys() == trained.keys()
        assert all(mx.array_equal(loaded[name], trained[name]) for name in trained)
    song = khala.generate(tags="pop", lyrics="la", seconds=0.05, min_seconds=0.05, seed=1)
    assert song.codes.shape == (8, 18)
    assert np.isfinite(song.waveform).all()


def test_config_and_card_tell_where_the_weights_come_from(finished: Path, tmp_path: Path) -> None:
    pack(tmp_path / "model", **sources(finished))
    config = KhalaConfig.load(tmp_path / "model/config.json")
    assert dataclasses.replace(config, source={}) == dataclasses.replace(
        CONFIG, fc1_bias="single", licence="Apache-2.0"
    )
    assert config.source["layout"] == "training runs"
    assert set(config.source["files"]) == {f"{part}.safetensors" for part in PARTS}
    text = (tmp_path / "model/README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\nlibrary_name: mlx\n")
    assert "trained with `khala train`" in text
    assert "Llama" not in text
    assert str(finished) not in text + json.dumps(config.to_dict())


def test_a_packed_model_can_be_converted_again(finished: Path, tmp_path: Path) -> None:
    pack(tmp_path / "model", **sources(finished), licence="CC BY 4.0")
    with pytest.warns(UserWarning, match="not Llama 3.1's"):
        convert(tmp_path / "model", tmp_path / "again", quantize=8, group_size=32)
    first, second = (KhalaConfig.load(tmp_path / n / "config.json") for n in ("model", "again"))
    assert second.source["files"] == first.source["files"]
    assert (second.licence, second.fc1_bias) == ("CC BY 4.0", "single")
    text = (tmp_path / "again/README.md").read_text()
    assert "licensed under CC BY 4.0" in text
    assert "trained with `khala train`" in text


def test_a_codec_in_half_precision_computes_in_float32(finished: Path, tmp_path: Path) -> None:
    result = command(finished, tmp_path / "half", "--codec-dtype", "float16")
    assert result.exit_code == 0, result.stderr
    pack(tmp_path / "full", **sources(finished))
    stored = mx.load(str(tmp_path / "half" / "codec.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.float16}
    half, full = (Khala.from_pretrained(tmp_path / name) for name in ("half", "full"))
    assert half.codec.encoder.conv_in.weight.dtype == mx.float32
    codes = np.zeros((CONFIG.codec.num_codebooks, 3), dtype=np.int64)
    close = np.abs(half.codec.decode(codes) - full.codec.decode(codes)).max()
    assert 0 < close < 0.01 * np.abs(full.codec.decode(codes)).max()


def test_dtype_and_quantisation(finished: Path, tmp_path: Path) -> None:
    options = ["--dtype", "float16", "--quantize", "8", "--group-size", "32", "--json"]
    result = command(finished, tmp_path / "model", *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["quantization"]["bits"] == 8
    pack(tmp_path / "plain", **sources(finished))
    packed, plain = (Khala.from_pretrained(tmp_path / name) for name in ("model", "plain"))
    assert packed.config.dtype == "float16"
    assert packed.config.quantization.keys() >= {"backbone.embed_tokens", "superres.lm_head"}
    ids = np.array([[1, 2, 3]])
    assert 0 < np.abs(packed.backbone(ids) - plain.backbone(ids)).max() < 0.1


@pytest.mark.parametrize("part", PARTS)
def test_unfinished_runs_are_refused(runs: Path, tmp_path: Path, part: str) -> None:
    for damage in ("config.json", f"{part}.safetensors", ""):
        path = runs / part / damage
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        result = command(runs, tmp_path / "made/model")
        assert result.exit_code == 1
        assert f"{runs / part} holds no finished {part} run." in result.stderr
        assert not (tmp_path / "made").exists()
        shutil.rmtree(runs / part, ignore_errors=True)
        write_run(runs / part, part)


def test_other_folders_are_no_runs(runs: Path, tmp_path: Path) -> None:
    pack(tmp_path / "model", **sources(runs))
    for folder in (tmp_path / "model", runs / "superres"):
        with pytest.raises(KhalaError, match="holds no finished backbone run"):
            pack(tmp_path / "x", **sources(runs) | {"backbone": folder})


def test_a_run_of_an_earlier_version_is_told_what_to_do(runs: Path, tmp_path: Path) -> None:
    about = json.loads((runs / "superres/config.json").read_text())
    (runs / "superres/config.json").write_text(json.dumps({"superres": about["superres"]}))
    with pytest.raises(KhalaError, match="repeat `khala train superres` with --resume"):
        pack(tmp_path / "x", **sources(runs))


def test_runs_that_do_not_fit_together_are_refused(runs: Path, tmp_path: Path) -> None:
    larger = dataclasses.replace(CONFIG.tokens, codebook_size=32)
    other = dataclasses.replace(
        CONFIG,
        tokens=larger,
        backbone=dataclasses.replace(CONFIG.backbone, vocab_size=larger.backbone_vocab),
        superres=dataclasses.replace(CONFIG.superres, vocab_size=larger.superres_vocab),
        codec=dataclasses.replace(CONFIG.codec, codebook_size=32),
    )
    for part in PARTS:
        write_run(runs / "other" / part, part, other)
    for changed, message in (
        (("backbone",), "different token layouts: codebook_size differ"),
        (("superres",), "different token layouts: codebook_size differ"),
        (
            ("codec",),
            r"do not fit together: codec\.codebook_size is 32, but the token layout has 16",
        ),
        (("backbone", "superres"), r"do not fit together: codec\.codebook_size is 16"),
    ):
        mixed = sources(runs) | {part: runs / "other" / part for part in changed}
        with pytest.raises(KhalaError, match=message):
            pack(tmp_path / "x", **mixed)
    pack(tmp_path / "x", **sources(runs) | {part: runs / "other" / part for part in PARTS})


def test_a_vocabulary_that_is_not_the_layouts_is_refused(runs: Path, tmp_path: Path) -> None:
    config = runs / "backbone/config.json"
    change(config, backbone=CONFIG.backbone.to_dict() | {"vocab_size": 400})
    with pytest.raises(
        KhalaError, match=r"backbone\.vocab_size is 400, but the token layout has 332"
    ):
        pack(tmp_path / "x", **sources(runs))
    change(config, backbone=CONFIG.backbone.to_dict() | {"num_layers": 1})
    with pytest.raises(KhalaError, match=r"backbone: \d+ tensors are unknown: layers\.1\."):
        pack(tmp_path / "x", **sources(runs))
    change(config, backbone=CONFIG.backbone.to_dict() | {"hidden_size": 40})
    with pytest.raises(KhalaError, match=r"backbone: \d+ tensors are misshapen"):
        pack(tmp_path / "x", **sources(runs))
    config.write_text("{")
    with pytest.raises(KhalaError, match=r"config\.json is not valid JSON"):
        pack(tmp_path / "x", **sources(runs))
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(runs: Path, tmp_path: Path) -> None:
    path = runs / "tokenizer.json"
    good = json.loads(path.read_text())
    missing = [token for token in good["added_tokens"] if token["content"] != "<|eot_id|>"]
    ordinary = [
        token | {"special": token["id"] != CONFIG.tokens.end_of_song}
        for token in good["added_tokens"]
    ]
    more = [*good["added_tokens"], good["added_tokens"][-1] | {"id": 300, "content": "<|more|>"}]
    for added, message in (
        (missing, r"<\|eot_id\|> is missing"),
        (ordinary, "id 257, which is the end of the song, is the ordinary token"),
        (more, "has the id 300, but audio codes begin at 300"),
    ):
        path.write_text(json.dumps(good | {"added_tokens": added}))
        with pytest.raises(KhalaError, match=message):
            pack(tmp_path / "x", **sources(runs))
    path.unlink()
    with pytest.raises(KhalaError, match=r"tokenizer\.json cannot be read"):
        pack(tmp_path / "x", **sources(runs))


def test_wrong_options_are_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "exists already" in command(finished, tmp_path / "there").stderr
    for options, message in (
        (["--quantize", "8"], "The backbone has rows of 32, which do not divide into groups of 64"),
        (["--licence", " "], "licence must be one line"),
        (["--licence", "a\nb"], "licence must be one line"),
    ):
        result = command(finished, tmp_path / "x", *options)
        assert result.exit_code == 1
        assert message in result.stderr
    assert not (tmp_path / "x").exists()
    assert CliRunner().invoke(main, ["train", "pack", "x"]).exit_code == 2
