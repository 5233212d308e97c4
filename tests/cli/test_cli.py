import dataclasses
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import fake_sounddevice
import mlx.core as mx
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from khala_mlx.cli import main, terminal
from khala_mlx.performance.machine import mac_with

KHALA = [sys.executable, "-c", "from khala_mlx.cli import main; main()"]
SHORT = ["--seconds", "0.1", "--min-seconds", "0.1"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def generate(model: Path, *arguments: Any) -> Result:
    return run("generate", "-m", model, *SHORT, *arguments)


def names() -> list[str]:
    return sorted(p.name for p in Path().iterdir())


def failed(result: Result, sentence: str, code: int = 1) -> None:
    """One line on stderr, the right exit code, no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Warning")]
    assert sentence in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len([line for line in errors if line.startswith("Error: ")]) == 1
    assert code == 1 or len(errors) == 1


def test_generate_writes_a_song(tiny_folder: Path) -> None:
    result = generate(tiny_folder, "--tags", "pop", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    assert names() == ["song.json", "song.take.safetensors", "song.wav"]
    assert "song.wav" in result.stdout
    assert "refine: 6/6" in result.stderr
    assert soundfile.info("song.wav").duration == pytest.approx(0.1, abs=0.003)
    again = generate(tiny_folder, "--tags", "pop", "--seed", 3, "--json")
    report = json.loads(again.stdout)
    assert report["file"] == "song-2.wav"
    assert report["licence"] == "CC BY-NC 4.0"
    assert Path("song.wav").read_bytes() == Path("song-2.wav").read_bytes()


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "deep/a.wav"])
def test_formats_by_suffix(tiny_folder: Path, name: str) -> None:
    assert generate(tiny_folder, "-o", name).exit_code == 0
    assert soundfile.info(name).samplerate == 44100


def test_bit_depth(tiny_folder: Path) -> None:
    assert generate(tiny_folder, "-o", "a.wav", "--bit-depth", "float").exit_code == 0
    assert soundfile.info("a.wav").subtype == "FLOAT"


def test_loud_songs_are_turned_down_unless_asked(tiny_folder: Path) -> None:
    loud = ["--seed", 1, "--bit-depth", "float"]
    result = generate(tiny_folder, *loud, "-o", "a.wav")
    assert "Warning: " in result.stderr
    assert "exceed full scale" in result.stderr
    assert np.abs(soundfile.read("a.wav")[0]).max() == pytest.approx(10 ** (-1 / 20), abs=1e-4)
    result = generate(tiny_folder, *loud, "-o", "b.wav", "--no-normalize")
    assert "they clip" in result.stderr
    assert np.abs(soundfile.read("b.wav")[0]).max() > 1


def test_like_makes_the_song_again(tiny_folder: Path) -> None:
    generate(
        tiny_folder, "--tags", "pop", "--lyrics", "la", "--seed", 3, "--top-k", 7, "-o", "a.wav"
    )
    result = run("generate", "-m", tiny_folder, "--like", "a.json", "-o", "b.wav")
    assert result.exit_code == 0, result.stderr
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()
    assert (
        run("generate", "-m", tiny_folder, "--like", "a.json", "--seed", 4, "-o", "c.wav").exit_code
        == 0
    )
    assert Path("a.wav").read_bytes() != Path("c.wav").read_bytes()
    recorded = json.loads(Path("c.json").read_text())["request"]
    assert (recorded["top_k"], recorded["tags"], recorded["seed"]) == (7, "pop", 4)


def test_like_with_another_file_of_lyrics(tiny_folder: Path) -> None:
    generate(tiny_folder, "--lyrics", "la", "--seed", 3, "-o", "a.wav")
    Path("words.txt").write_bytes("\ufeffdo re\r\nmi fa\r".encode())
    result = run(
        "generate",
        "-m",
        tiny_folder,
        "--like",
        "a.json",
        "--lyrics-file",
        "words.txt",
        "-o",
        "b.wav",
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(Path("b.json").read_text())["request"]["lyrics"] == "do re\nmi fa\n"


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.ogg", "a.wav"])
def test_a_finished_file_tells_all_and_makes_the_song_again(tiny_folder: Path, name: str) -> None:
    asked = ["--tags", "pop", "--lyrics", "la\nlé", "--seed", 3, "--title", "Ö", "--artist", "me"]
    result = run(
        "generate", "-m", tiny_folder, *asked, "--seconds", 0.6, "--min-seconds", 0.6,
        "--loudness", -20, "--fade", 0.1, "-o", name,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    Path("a.json").rename("kept.json")
    Path("alone").mkdir()
    shutil.move(name, "alone")
    told = json.loads(run("info", f"alone/{name}", "--json").stdout)
    assert (told["title"], told["artist"], told["lyrics"]) == ("Ö", "me", "la\nlé")
    assert (told["seed"], told["licence"], told["model"]) == (3, "CC BY-NC 4.0", "model")
    assert told["loudness_lufs"] == pytest.approx(-20, abs=0.5)
    result = run("generate", "-m", tiny_folder, "--like", f"alone/{name}", "-o", "b.wav")
    assert result.exit_code == 0, result.stderr
    again = json.loads(Path("b.json").read_text())
    assert again["request"] == json.loads(Path("kept.json").read_text())["request"]
    assert np.array_equal(
        mx.load("a.take.safetensors")["codes"], mx.load("b.take.safetensors")["codes"]
    )


def test_like_a_file_without_a_record(tiny_folder: Path) -> None:
    soundfile.write("a.wav", np.zeros((500, 2)), 44100)
    failed(generate(tiny_folder, "--like", "a.wav"), "a.wav has no record of how it was made")
    failed(generate(tiny_folder, "--like", "b.mp3"), "b.mp3 cannot be read: No such file")


def test_like_another_model_is_told(tiny_folder: Path) -> None:
    generate(tiny_folder, "--seed", 3, "-o", "a.wav")
    sidecar = json.loads(Path("a.json").read_text())
    sidecar["model"]["config_sha256"] = "0" * 64
    Path("a.json").write_text(json.dumps(sidecar))
    result = run("generate", "-m", tiny_folder, "--like", "a.json", "-o", "b.wav")
    assert result.exit_code == 0
    assert "Warning: a.json was made by another model" in result.stderr


def test_dry_run_shows_the_prompt_and_loads_nothing(tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    result = run(
        "generate", "-m", "model", "--tags", "pop", "--lyrics", "la", "--dry-run", "--json"
    )
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["backbone_prompt"].startswith("<|begin_of_text|>pop<|eom_id|>")
    assert plan["backbone_prompt_tokens"] > 9
    assert names() == ["model"]


def test_dry_run_tells_memory_and_time(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run("generate", "-m", tiny_folder, "--dry-run")
    assert here.exit_code == 0, here.stderr
    for line in ("compose  ", "refine  ", "render  ", "fits the usable"):
        assert line in here.stdout
    mac = json.loads(
        run("generate", "-m", tiny_folder, "--dry-run", "--json", "--memory", "16GB").stdout
    )["memory"]
    assert mac["usable_bytes"] == 2**34 * 2 // 3
    assert mac["peak_bytes"] == max(stage["peak_bytes"] for stage in mac["stages"].values())
    with monkeypatch.context() as on_a_mac:
        on_a_mac.setattr("khala_mlx.cli.session.this_machine", lambda: mac_with(2**34))
        asked = run("generate", "-m", tiny_folder, "--dry-run", "--json", "--memory", "64GB")
        assert json.loads(asked.stdout)["memory"]["usable_bytes"] == 2**36 * 3 // 4
    with monkeypatch.context() as on_a_slow_one:
        slow = dataclasses.replace(mac_with(2**34), flops=1e6)
        on_a_slow_one.setattr("khala_mlx.pipeline.khala.this_machine", lambda: slow)
        seconds = []
        for options in ((), ("--candidates", "2", "--best", "1", "--draft", "4")):
            told = json.loads(
                run("generate", "-m", tiny_folder, "--dry-run", "--json", *options).stdout
            )
            seconds.append(told["memory"]["stages"]["refine"]["least_seconds"])
        # Of six fine layers two for both, the other four for the best.
        assert seconds[1] == pytest.approx(seconds[0] * (2 * 2 + 4) / 6, abs=0.02)
    tight = run("generate", "-m", tiny_folder, "--dry-run", "--memory", "0.00001GB")
    assert "does not fit" in tight.stdout
    failed(run("generate", "-m", tiny_folder, "--memory", "0.00001GB"), "can be used")
    failed(run("generate", "-m", tiny_folder, "--memory", "much"), "as in 16GB")
    assert names() == []


def test_play(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_sounddevice.install(monkeypatch)
    assert generate(tiny_folder, "--play").exit_code == 0
    assert run("play", "song.wav").exit_code == 0
    assert device.format == (44100, 2)
    assert len(device.heard) >= 2 * soundfile.info("song.wav").frames
    failed(run("play", "absent.wav"), "cannot be read")


def test_a_song_is_heard_while_it_is_rendered(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from khala_mlx.audio import player

    monkeypatch.setattr("khala_mlx.pipeline.khala.HEARD_SECONDS", 0.02)
    device = fake_sounddevice.install(monkeypatch, speed=5)
    added: list[tuple[int, int]] = []
    add = player.Track.add

    def note(track: player.Track, block: np.ndarray) -> None:
        added.append((len(block), len(device.blocks)))
        add(track, block)
        if len(added) == 1:
            # As a song that takes longer to make than to hear.
            time.sleep(0.2)

    monkeypatch.setattr(player.Track, "add", note)
    options = ["--bit-depth", "float", "--no-normalize", "--fade", 0.05]
    result = generate(tiny_folder, "--play", *options)
    assert result.exit_code == 0, result.stderr
    # Several pieces, and the first was heard before the last was there.
    assert len(added) > 2
    assert added[-1][1] > 0
    wave = soundfile.read("song.wav", always_2d=True)[0].clip(-1, 1)
    assert sum(count for count, _ in added) == len(wave)
    heard = device.heard[device.heard.any(axis=1)]
    assert np.abs(heard - wave[wave.any(axis=1)]).max() < 1e-6


def test_play_a_take(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tiny_folder, "--bit-depth", "float", "--no-normalize")
    device = fake_sounddevice.install(monkeypatch)
    result = run("play", "song.take.safetensors")
    assert result.exit_code == 0, result.stderr
    wave = soundfile.read("song.wav", always_2d=True)[0].clip(-1, 1)
    heard = device.heard[device.heard.any(axis=1)]
    assert np.abs(heard - wave[wave.any(axis=1)]).max() < 1e-4
    device = fake_sounddevice.install(monkeypatch, error="gone")
    failed(run("play", "song.take.safetensors"), "No sound could be played")


def test_without_a_device_the_song_is_written(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sounddevice.install(monkeypatch, error="Error querying device -1")
    result = generate(tiny_folder, "--play")
    assert result.exit_code == 0
    assert "Warning: No sound could be played, there may be no audio device" in result.stderr
    assert names() == ["song.json", "song.take.safetensors", "song.wav"]
    failed(run("play", "song.wav"), "No sound could be played")


def test_encode_and_decode(tiny_folder: Path) -> None:
    generate(tiny_folder, "-o", "a.wav")
    result = run("encode", "a.wav", "codes.npz", "-m", tiny_folder, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert np.load("codes.npz")["codes"].shape == (8, told["frames"])
    result = run("decode", "codes.npz", "b.flac", "-m", tiny_folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert soundfile.info("b.flac").frames == told["frames"] * 128


def test_info(tiny_folder: Path) -> None:
    generate(tiny_folder, "--tags", "pop", "-o", "a.wav")
    run("encode", "a.wav", "codes.npz", "-m", tiny_folder)
    told = json.loads(run("info", tiny_folder, "--json").stdout)
    assert told["kind"] == "model"
    assert told["licence"] == "CC BY-NC 4.0"
    assert json.loads(run("info", "a.wav", "--json").stdout)["tags"] == "pop"
    assert json.loads(run("info", "codes.npz", "--json").stdout)["layers"] == 8
    take = json.loads(run("info", "a.take.safetensors", "--json").stdout)
    sound = json.loads(run("info", "a.wav", "--json").stdout)
    # 35 frames are a little longer than the 0.1 seconds asked for.
    assert (take["frames"], take["seconds"], sound["seconds"]) == (35, 0.102, 0.102)
    assert take["max_seconds"] == sound["max_seconds"] == 0.1
    assert "layers" in run("info", "codes.npz").stdout
    Path("a.json").unlink()
    assert json.loads(run("info", "a.wav", "--json").stdout)["tags"] == "pop"
    soundfile.write("a.wav", np.zeros((500, 2)), 44100)
    assert "tags" not in json.loads(run("info", "a.wav", "--json").stdout)


def test_info_draws(tiny_folder: Path) -> None:
    generate(tiny_folder, "-o", "a.wav")
    run("encode", "a.wav", "codes.npz", "-m", tiny_folder)
    for name in ("a.wav", "a.take.safetensors", "codes.npz"):
        told = json.loads(run("info", name, "--plot", f"{name}.png", "--json").stdout)
        assert Path(told["plot"]).stat().st_size > 5000
    # Without the tokens it has one panel less.
    Path("a.take.safetensors").unlink()
    run("info", "a.wav", "--plot", "alone.png")
    assert image_height("alone.png") < image_height("a.wav.png")
    failed(run("info", "a.wav", "--plot", "alone.png"), "exists already")
    failed(run("info", tiny_folder, "--plot", "m.png"), "is a model")


def image_height(name: str) -> int:
    from matplotlib.image import imread

    return int(imread(name).shape[0])


def test_info_refuses_what_it_does_not_know(tiny_folder: Path) -> None:
    Path("text.wav").write_text("no sound")
    Path("a.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]")
    Path("b.safetensors").write_bytes(b"\xff" * 40)
    Path("empty").mkdir()
    mx.save_safetensors("c.safetensors", {"x": mx.zeros(3)})
    for name, sentence in [
        ("absent", "no file or folder absent"),
        ("text.wav", "not a sound file"),
        ("empty", "config.json"),
        ("a.safetensors", "not a complete safetensors"),
        ("b.safetensors", "not a complete safetensors"),
        ("c.safetensors", "is not a Khala take"),
    ]:
        failed(run("info", name), sentence)


def test_convert_reports_and_shows_the_licence(oracle: Path) -> None:
    tokenizer = oracle / "tokenizer_small" / "tokenizer.json"
    source = oracle / "vinpolar"
    result = run(
        "convert", source, "model", "--dtype", "float32", "--tokenizer", tokenizer, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert "CC BY-NC 4.0" in result.stderr
    json.loads(result.stdout)
    result = run("convert", source, "model", "--tokenizer", tokenizer)
    failed(result, "model exists already")
    result = run("convert", "model", "other", "--quantize", "8")
    failed(result, "no row divides into groups of 64")
    plain = run("convert", "model", "other", "--dtype", "float16")
    assert plain.exit_code == 0, plain.stderr
    for line in ("layout    khala", "fc1_bias  double", "backbone  35 tensors"):
        assert line in plain.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seconds", "-1"], "number of seconds"),
        (["--top-k", "0"], "top_k"),
        (["--minutes", "11"], "1..10"),
        (["-o", "a.xyz"], ".wav, .flac, .ogg, .mp3"),
        (["-o", "a.mp3", "--bit-depth", "24"], "only 16"),
        (["-o", "taken.wav"], "taken.json exists already"),
        (["--loudness", "3"], "loudness must be -70 to 0"),
        (["--fade", "-1"], "fade must be"),
        (["-o", "binary/a.wav"], "binary/a.wav cannot be written: Not a directory."),
        (["--like", "absent.json"], "absent.json cannot be read"),
        (["--lyrics", "x" * 400], "--truncate-lyrics"),
        (["--lyrics-file", "binary"], "binary is damaged: it is not whole utf-16-le"),
        (["--seed", "-3"], "seed"),
        (["-m", "absent"], "no model folder"),
        (["-m", "new\nline"], "no model folder or Hub repository new line"),
    ],
)
def test_user_errors(tiny_folder: Path, arguments: list[str], sentence: str) -> None:
    Path("taken.json").write_text("{}")
    Path("binary").write_bytes(b"\xff\xfe\xff")
    failed(run("generate", "-m", tiny_folder, *arguments), sentence)
    assert names() == ["binary", "taken.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "--tag", "pop"], "Did you mean '--tags'"),
        (["generate", "--minutes", "two"], "--minutes"),
        (["generate", "--text-mode", "x"], "same_as_backbone"),
        (["generate", "--lyrics", "a", "--lyrics-file", "words.txt"], "not both"),
        (["generate", "--lyrics-file", "absent.txt"], "absent.txt"),
        (["convert", "only-one"], "DEST"),
        (["sing"], "No such command"),
    ],
)
def test_usage_errors(arguments: list[str], sentence: str) -> None:
    Path("words.txt").write_text("la")
    failed(run(*arguments), sentence, code=2)


def test_no_command_shows_the_help() -> None:
    assert "Usage: " in run().stderr
    assert run().exit_code == 2
    assert run("generate", "-h").exit_code == 0


def test_codec_commands_check_their_names_first(tiny_folder: Path) -> None:
    np.savez("codes.npz", codes=np.zeros((8, 2), int))
    np.savez("wrong.npz", codes=np.full((8, 2), 99))
    soundfile.write("a.wav", np.zeros((500, 2)), 44100)
    failed(run("encode", "a.wav", "codes.npz", "-m", tiny_folder), "exists already")
    failed(run("encode", "a.wav", "codes.txt", "-m", tiny_folder), ".npz")
    failed(run("encode", "absent.wav", "b.npz", "-m", tiny_folder), "absent.wav cannot be read")
    failed(run("decode", "codes.npz", "a.wav", "-m", tiny_folder), "exists already")
    failed(run("decode", "wrong.npz", "b.wav", "-m", tiny_folder), "0..15")


def test_lyrics_from_stdin(tiny_folder: Path) -> None:
    result = CliRunner().invoke(
        main, ["generate", "-m", str(tiny_folder), *SHORT, "--lyrics-file", "-"], input="la la\n"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(Path("song.json").read_text())["request"]["lyrics"] == "la la\n"


def test_unexpected_errors_are_one_line(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("line one\nline two")

    monkeypatch.setattr("khala_mlx.song.info.describe", broken)
    failed(run("info", tiny_folder), "Unexpected RuntimeError: line one line two")
    monkeypatch.setenv("KHALA_DEBUG", "1")
    assert "Traceback" in run("info", tiny_folder).stderr

    def huge(*_: Any) -> None:
        raise MemoryError

    monkeypatch.delenv("KHALA_DEBUG")
    monkeypatch.setattr("khala_mlx.song.info.describe", huge)
    failed(run("info", tiny_folder), "not enough memory")


def test_other_warnings_stay_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    monkeypatch.setattr(
        "khala_mlx.song.info.describe", lambda _: warnings.warn("hm", stacklevel=1) or {"a": 1}
    )
    assert run("info", "x").stderr == ""


def test_help_is_fast_and_version_works() -> None:
    def helped() -> float:
        """Processor seconds, which other work on the machine hardly changes."""
        before = os.times()
        subprocess.run([*KHALA, "--help"], check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before[2] - before[3]

    assert min(helped() for _ in range(5)) < 0.3
    assert "version" in run("--version").stdout


SLOW = """
import sys, time
import khala_mlx.audio.files
def write_slowly(temporary, *_, **__):
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
khala_mlx.audio.files.encode_audio = write_slowly
from khala_mlx.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_at_once_and_leaves_the_take(tiny_folder: Path, how: signal.Signals) -> None:
    arguments = ["generate", "-m", str(tiny_folder), *SHORT, "-o", "a.wav"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert any(name.startswith(".") for name in names())
    began = time.perf_counter()
    process.send_signal(how)
    _, stderr = process.communicate(timeout=10)
    assert time.perf_counter() - began < 1
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert "khala generate --resume a.take.safetensors" in stderr
    assert names() == ["a.take.safetensors"]


def test_ctrl_c_inside_an_evaluation(tiny_folder: Path) -> None:
    code = (
        "import sys, threading, mlx.core as mx, khala_mlx.song.info as info\n"
        "def long(path):\n"
        "    x = mx.ones((3000, 3000))\n"
        "    print('working', flush=True)\n"
        "    for _ in range(2000): x = (x @ x) * 1e-3\n"
        "    mx.eval(x)\n"
        "info.describe = long\n"
        "from khala_mlx.cli import main\n"
        "main(['info', 'x'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=10)
    assert time.perf_counter() - began < 1
    assert process.returncode == 1


def drawn(code: list[str], columns: int = 80, **environment: str) -> str:
    """What a command draws on a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 5, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        code, stderr=follower, stdout=subprocess.DEVNULL, env={**inherited, **environment}
    )
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            data = os.read(leader, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(leader)
    assert process.wait(timeout=30) == 0
    return shown.decode()


def test_a_terminal_gets_a_bar_with_the_time_left(tiny_folder: Path) -> None:
    text = drawn([*KHALA, "generate", "-m", str(tiny_folder), *SHORT, "-o", "a.wav"], TERM="xterm")
    for stage in ("compose", "refine", "render"):
        assert re.search(rf"^{stage} .*100%.* taken", text.replace("\r", "\n"), re.MULTILINE) or (
            stage in text
        )
    assert text.count("taken") >= 3
    assert "100%" in text
    # The cursor is shown again at the end.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


PACED = [
    sys.executable,
    "-c",
    "from khala_mlx.cli.terminal import Progress\n"
    "progress = Progress()\n"
    "for done in range(13): progress('refine', done, 12)\n",
]


def test_a_terminal_that_cannot_draw_gets_lines() -> None:
    text = drawn(PACED, TERM="dumb")
    assert "\x1b" not in text
    assert "refine: 12/12" in text


def test_no_colour_where_none_is_wanted() -> None:
    text = drawn(PACED, TERM="xterm", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)


def test_bars_fit_a_narrow_window() -> None:
    text = drawn(PACED, columns=20, TERM="xterm")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 20


def test_plain_lines_are_at_most_one_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    progress = terminal.Progress()
    for done in range(1, 1001):
        progress("compose", done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "compose: 1/1000"
    assert all(re.fullmatch(r"compose: \d+/1000, 0:00 left", line) for line in lines[1:-1])
    assert lines[-1] == "compose: 1000/1000, 0:00 taken"


def test_work_happens_in_one_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    monkeypatch.setattr(
        "khala_mlx.song.info.describe",
        lambda _: threads.append(threading.current_thread().name) or {"a": 1},
    )
    run("info", "x")
    assert threads != ["MainThread"]
