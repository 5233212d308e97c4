"""Downloads with the real huggingface_hub from a server on loopback that fails as it is told."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from click.testing import CliRunner
from fake_checkpoints import Sizes, write_megatron, write_tokenizer, write_vinpolar
from fake_hub import REPO, SHA, FakeHub, serving
from huggingface_hub import constants, errors

from khala_mlx import library as models
from khala_mlx.cli import main
from khala_mlx.config import KhalaConfig
from khala_mlx.convert import convert
from khala_mlx.convert.partial_download import fetch_codec
from khala_mlx.errors import ConvertError, HubError, KhalaError
from khala_mlx.model.weights import find_model
from khala_mlx.storage import hub as hubs
from khala_mlx.storage.hub import Listing, RemoteFile

pytestmark = pytest.mark.filterwarnings("ignore::khala_mlx.errors.KhalaWarning")
NAME = "someone--khala"
CODEC = "dac_rvq_7.ckpt"
BALLAST = 3 << 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources in all layouts; the codec checkpoint holds much that nobody needs."""
    root = tmp_path_factory.mktemp("sources")
    sizes = Sizes(layers=1)
    write_megatron(root / "megatron", sizes)
    write_vinpolar(root / "vinpolar", sizes)
    write_tokenizer(root / "tokenizer")
    convert(root / "vinpolar", root / "khala", tokenizer=root / "tokenizer")
    codec = next((root / "megatron").glob("*.ckpt"))
    codec.rename(root / "megatron" / CODEC)
    _add_ballast(root / "megatron" / CODEC)
    convert(root / "megatron", root / "expected", dtype="float32", tokenizer=root / "tokenizer")
    return root


def _add_ballast(path: Path) -> None:
    """Entries of an optimiser in a torch file, before and behind its own."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    stem = entries[0][0].partition("/")[0]
    ballast = np.random.default_rng(0).bytes(BALLAST)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in [
            *entries[: len(entries) // 2],
            (f"{stem}/data/90001", ballast),
            *entries[len(entries) // 2 :],
            (f"{stem}/data/90002", ballast),
        ]:
            archive.writestr(name, data)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KHALA_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def hub(
    sources: Path, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[FakeHub]:
    layout = getattr(request, "param", "megatron")
    fake = FakeHub({**files_of(sources / layout), "pictures/cover.png": b"x" * 9999})
    with serving(fake):
        use(fake, monkeypatch)
        yield fake


def use(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, for a module that is imported already."""
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def fetched(sources: Path, **options: Any) -> Path:
    asked = {"tokenizer": sources / "tokenizer", "dtype": "float32", **options}
    return models.download(REPO, accept=lambda *_: True, **asked)


def check(sources: Path, folder: Path) -> None:
    """The model equals the one converted from the same files at hand."""
    expected = sources / "expected"
    for name in ("backbone", "superres", "codec"):
        here = (folder / f"{name}.safetensors").read_bytes()
        assert here == (expected / f"{name}.safetensors").read_bytes()
    ours, theirs = (KhalaConfig.load(p / "config.json").source for p in (folder, expected))
    assert ours["files"] == theirs["files"]
    assert (ours["repo"], ours["revision"]) == (REPO, SHA)
    assert [p.name for p in (folder.parent / ".downloads").iterdir()] == []


def test_a_model_is_fetched_and_converted(hub: FakeHub, sources: Path, home: Path) -> None:
    told: list[tuple[int, int]] = []
    folder = fetched(
        sources, on_progress=lambda stage, *at: told.append(at) if stage == "download" else None
    )
    assert folder == home / NAME
    check(sources, folder)
    assert find_model(REPO) == find_model(NAME) == folder
    # Of the codec's file the ballast has not come, of the others each byte once.
    assert hub.sent[CODEC] < len(hub.files[CODEC]) - 2 * BALLAST + (256 << 10)
    assert hub.sent["pictures/cover.png"] == 0
    for name in hub.files.keys() - {CODEC, "pictures/cover.png"}:
        assert hub.sent[name] == len(hub.files[name])
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    with pytest.raises(KhalaError, match="exists already"):
        fetched(sources)


def fault(hub: FakeHub, kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the server or the disk fail; returns what the error must say."""
    big = next(n for n in hub.files if n.endswith(".distcp"))
    if kind == "broken connection":
        hub.cut_after[big] = [1000] * 50
        return "[Tt]ry again"
    if kind == "broken part":
        hub.cut_after[CODEC] = [100] * 50
        return "[Tt]ry again|did not send"
    if kind == "wrong checksum":
        hub.damaged[big] = 1
        return "not what the Hub says"
    if kind == "damaged part":
        hub.damaged[CODEC] = 99
        return "was damaged on its way"
    if kind == "full disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        return "GB free: make room"
    if kind == "disk fills up":

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(models, "convert", full)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
        return "No space left"
    if kind == "missing file":
        hub.unlisted = {big}
        return "is missing a file"
    if kind == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

        def forbidden(*_: Any, **__: Any) -> None:
            raise errors.OfflineModeIsEnabled("x")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", forbidden)
        return "HF_HUB_OFFLINE"
    where, status = kind.split()
    hub.status["api" if where == "listing" else big] = int(status)
    return "no such repository" if kind == "listing 404" else f"the Hub answered {status}"


FAULTS = [
    "broken connection",
    "broken part",
    "wrong checksum",
    "damaged part",
    "full disk",
    "disk fills up",
    "missing file",
    "offline",
    "listing 403",
    "listing 404",
    "listing 500",
    "file 403",
    "file 404",
    "file 503",
]


@pytest.mark.parametrize("kind", FAULTS)
def test_every_fault_is_told_and_the_next_try_finishes(
    hub: FakeHub, sources: Path, home: Path, kind: str
) -> None:
    with pytest.MonkeyPatch.context() as broken:
        message = fault(hub, kind, broken)
        with pytest.raises(KhalaError, match=message) as told:
            fetched(sources)
    assert "\n" not in str(told.value)
    assert not (home / NAME).exists()
    for faults in (hub.status, hub.cut_after, hub.damaged, hub.unlisted):
        faults.clear()
    folder = fetched(sources)
    check(sources, folder)
    damaged = {"wrong checksum": ".distcp", "damaged part": ".ckpt"}.get(kind, "none")
    for name, data in hub.files.items():
        if not name.endswith(damaged):
            # A connection that breaks may cost what was on its way, never a whole file.
            assert hub.sent[name] <= len(data) * 1.2 + 50 * 1000, name


def test_a_wrong_sum_at_the_hub_never_becomes_a_model(
    hub: FakeHub, sources: Path, home: Path
) -> None:
    name = next(n for n in hub.files if n.endswith(".distcp"))
    hub.wrong_sum = {name}
    for _ in range(2):
        with pytest.raises(HubError, match="not what the Hub says"):
            fetched(sources)
    assert not (home / NAME).exists()


def test_a_hub_without_parts_of_files(
    hub: FakeHub, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some mirrors give whole files only: the codec's then comes whole, and not into memory."""
    hub.no_ranges = True
    with pytest.raises(hubs.NoParts):
        hubs.read_range(REPO, SHA, CODEC, 0, 10)
    check(sources, fetched(sources))


@pytest.mark.parametrize("hub", ["khala"], indirect=True)
def test_a_converted_model_is_taken_as_it_is(
    hub: FakeHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for it once: it is moved, not copied.
    size = sum(map(len, hub.files.values())) + models._SPARE_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, size))
    folder = models.download(REPO, accept=lambda *_: True)
    for name in ("backbone.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == hub.files[name]
    assert not (folder / "pictures").exists()


def test_the_released_model_needs_room_for_itself_and_the_converted_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Listing(REPO, SHA, {"all": RemoteFile(19 * 10**9)})
    for dtype, need in (("bfloat16", 27.3e9), ("float32", 34.3e9)):
        for free, fits in ((need - 3e8, False), (need + 3e8, True)):
            usage = shutil._ntuple_diskusage(0, 0, int(free))
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            written = models._at_most_written(dtype)
            with nullcontext() if fits else pytest.raises(KhalaError, match="make room"):
                models._require_space(there, ["all"], home / "staging", written)


def test_the_licence_is_asked_for_once(hub: FakeHub, sources: Path, home: Path) -> None:
    asked: list[tuple[str, str]] = []
    how = {"tokenizer": sources / "tokenizer", "dtype": "float32"}
    with pytest.raises(KhalaError, match="licence was not accepted"):
        models.download(REPO, accept=lambda *_: False, **how)
    assert sum(hub.sent[name] for name in hub.files) == 0
    models.download(REPO, accept=lambda *a: bool(asked.append(a)) or True, **how)
    models.remove(REPO)
    models.download(REPO, accept=lambda *a: bool(asked.append(a)) or True, **how)
    assert asked == [(REPO, "cc-by-nc-4.0")]


def test_what_has_come_is_enough_without_a_network(hub: FakeHub, sources: Path) -> None:
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(models, "convert", lambda *_, **__: (_ for _ in ()).throw(KhalaError("no")))
        with pytest.raises(KhalaError, match="no"):
            fetched(sources)
    hub.status["api"] = 500
    with pytest.MonkeyPatch.context() as broken:
        fault(hub, "offline", broken)
        check(sources, fetched(sources))


def test_listing_and_removing(hub: FakeHub, sources: Path, home: Path) -> None:
    fetched(sources, name="mine", quantize=None)
    (home / "broken").mkdir()
    told = {each["name"]: each for each in models.models()}
    assert list(told) == ["demo", "broken", "mine"]
    assert "config.json" in told["broken"]["damaged"]
    assert (told["mine"]["source"], told["mine"]["revision"]) == (REPO, SHA)
    assert models.remove("mine") > 0
    assert not (home / "mine").exists()
    for name in ("mine", "absent"):
        with pytest.raises(KhalaError, match="There is no model"):
            models.remove(name)


@pytest.mark.parametrize("name", ["..", ".", "", "/etc", "a\\b", ".downloads", "a\nb", "*"])
def test_names_that_lead_elsewhere(home: Path, name: str) -> None:
    (home / ".downloads").mkdir(parents=True)
    with pytest.raises(KhalaError, match=r"cannot be the name|There is no model"):
        models.remove(name)
    assert (home / ".downloads").exists()


def test_a_link_is_removed_and_not_what_it_leads_to(home: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    home.mkdir()
    (home / "link").symlink_to(tmp_path / "precious")
    models.remove("link")
    assert (tmp_path / "precious").exists()
    assert not (home / "link").is_symlink()


def test_names_of_files_that_lead_elsewhere(hub: FakeHub, sources: Path, home: Path) -> None:
    hub.files["backbone/../../../evil/common.pt"] = b"x"
    with pytest.raises(HubError, match="holds a file with the name"):
        fetched(sources)


def test_the_command_shows_the_licence(hub: FakeHub, home: Path) -> None:
    refused = CliRunner().invoke(main, ["models", "download", REPO])
    assert refused.exit_code == 1
    assert "under the licence: cc-by-nc-4.0" in refused.stderr
    assert "--accept-licence" in refused.stderr
    assert sum(hub.sent[name] for name in hub.files) == 0
    listed = CliRunner().invoke(main, ["models", "list", "--json"])
    assert [each["name"] for each in json.loads(listed.stdout)["models"]] == ["demo"]
    assert "demo" in CliRunner().invoke(main, ["models", "list"]).stdout
    assert CliRunner().invoke(main, ["models", "remove", "../x"]).exit_code == 1


def test_the_endpoint_of_the_environment(hub: FakeHub, sources: Path, home: Path) -> None:
    """The command, in a process of its own."""
    code = "from khala_mlx.cli import main; main()"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    how = ["--tokenizer", str(sources / "tokenizer"), "--dtype", "float32"]
    command = [sys.executable, "-c", code, "models", "download", REPO, *how]
    done = subprocess.run(
        [*command, "--accept-licence", "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == NAME
    assert "licence: cc-by-nc-4.0" in done.stderr


class Broken(Exception):
    pass


def test_a_part_of_a_file_is_gone_on_with(sources: Path, tmp_path: Path) -> None:
    data = (sources / "megatron" / CODEC).read_bytes()
    left, asked = 1, 0

    def read(start: int, stop: int) -> bytes:
        nonlocal left, asked
        if left == 0:
            left = 1
            raise Broken
        left -= 1
        asked += stop - start
        return data[start:stop]

    path = tmp_path / "deep.ckpt"
    for _ in range(1000):
        try:
            assert fetch_codec(path, len(data), read)
            break
        except Broken:
            continue
    assert path.stat().st_size == len(data)
    # Each byte once, and the ballast not at all.
    assert asked < len(data) - 2 * BALLAST + (256 << 10)
    assert [p.name for p in tmp_path.iterdir()] == ["deep.ckpt"]


def test_parts_without_checksums_are_not_trusted(sources: Path, tmp_path: Path) -> None:
    data = (sources / "vinpolar/decoder_weights.pt").read_bytes()
    import zipfile

    with zipfile.ZipFile(sources / "vinpolar/decoder_weights.pt") as archive:
        sums = {info.CRC for info in archive.infolist() if info.file_size}
    for crc in sums - {zlib.crc32(b"")}:
        data = data.replace(crc.to_bytes(4, "little"), bytes(4))
    assert not fetch_codec(tmp_path / "a.ckpt", len(data), lambda a, b: data[a:b])
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for data in (b"", b"no zip" * 1000):
        with pytest.raises(ConvertError, match="not a torch file"):
            fetch_codec(tmp_path / "a.ckpt", len(data), lambda a, b, d=data: d[a:b])


def test_ranges_of_the_hub(hub: FakeHub) -> None:
    data = hub.files[CODEC]
    assert hubs.read_range(REPO, SHA, CODEC, 5, 50) == data[5:50]


@pytest.mark.parametrize("hub", ["khala"], indirect=True)
def test_what_lies_deeper_is_no_part_of_a_converted_model(hub: FakeHub) -> None:
    hub.files["adapters/jazz.safetensors"] = b"x"
    folder = models.download(REPO, accept=lambda *_: True)
    assert (folder / "config.json").is_file()
    assert not (folder / "adapters").exists()
    assert hub.sent["adapters/jazz.safetensors"] == 0


def test_no_model_takes_the_name_of_the_one_in_the_box(hub: FakeHub, sources: Path) -> None:
    with pytest.raises(KhalaError, match="demo is the bundled demo model"):
        fetched(sources, name="demo")
    assert not hub.requests


@pytest.mark.parametrize("wrong", [{"siblings": [{"rfilename": "a", "size": "b"}]}, {"sha": None}])
def test_an_endpoint_that_tells_nonsense(
    hub: FakeHub, sources: Path, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {**hub.info(), **wrong}
    monkeypatch.setattr(hub, "info", lambda: info)
    with pytest.raises(HubError, match="cannot be fetched"):
        fetched(sources)


def test_a_licence_cannot_steer_the_terminal(hub: FakeHub, sources: Path) -> None:
    hub.licence = "a\x1b[31m\nb"
    asked: list[str] = []
    with pytest.raises(KhalaError, match="not accepted"):
        models.download(REPO, accept=lambda _, licence: bool(asked.append(licence)))
    assert asked[0].isprintable()


def test_a_licence_cannot_pass_for_another_model(home: Path) -> None:
    shutil.copytree(find_model("demo"), home / "mine")
    config = json.loads((home / "mine" / "config.json").read_text())
    (home / "mine" / "config.json").write_text(json.dumps({**config, "licence": "a\nother  b"}))
    told = CliRunner().invoke(main, ["models", "list"]).stdout
    assert len(told.splitlines()) == 2


def test_only_what_has_come_of_the_model_itself_is_removed(home: Path) -> None:
    (home / ".downloads" / "someone--khala@0").mkdir(parents=True)
    with pytest.raises(KhalaError, match="There is no model"):
        models.remove("someone--khal?")
    models.remove("someone/khala")
    assert not list((home / ".downloads").iterdir())


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fake = FakeHub({})
        fake.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        use(fake, monkeypatch)
        monkeypatch.setattr(hubs, "_PATIENCE", 0.1)
        with pytest.raises(hubs.Unreachable, match="no answer in time"):
            hubs.listing(REPO)
        with pytest.raises(hubs.Unreachable, match="no answer in time"):
            hubs.read_range(REPO, SHA, "a", 0, 1)
