import json
import shutil
import sys
from pathlib import Path
from typing import Any

import fake_sounddevice
import pytest
from click.testing import CliRunner

from khala_mlx.cli import main
from khala_mlx.cli.commands import machine as doctor
from khala_mlx.config import KhalaConfig
from khala_mlx.performance.machine import mac_with
from khala_mlx.performance.memory import Setting
from khala_mlx.pipeline.plan import Job, make_plan


def test_a_machine_that_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_sounddevice.install(monkeypatch)
    monkeypatch.setenv("KHALA_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
    monkeypatch.setattr("khala_mlx.performance.machine.usable_memory", lambda: 13 * 10**9)
    found = doctor.examine()
    assert found["sound"] == "Fake"
    assert found["released_weights_fit_in"] == "16 bit, 8 bit, 6 bit, 4 bit"
    assert found["fixes"] == []
    assert "No problems." in CliRunner().invoke(main, ["doctor"]).stdout


def test_what_fits_is_the_envelope_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    def mac(gibibytes: int) -> dict[str, Any]:
        monkeypatch.setattr(
            "khala_mlx.performance.machine.this_machine", lambda: mac_with(gibibytes * 2**30)
        )
        return doctor.examine()

    three_minutes = Job(400, 400, 3876)
    plan = make_plan(
        KhalaConfig(), Setting("bfloat16", False), mac_with(16 * 2**30), three_minutes,
        keep_loaded=False,
    )  # fmt: skip
    assert mac(16)["released_weights_need"].startswith(f"{plan.peak / 1e9:.1f} GB in 16 bit")
    assert [mac(size)["released_weights_fit_in"] for size in (16, 5, 2)] == [
        "16 bit, 8 bit, 6 bit, 4 bit", "8 bit, 6 bit, 4 bit", "none",
    ]  # fmt: skip


def test_what_is_wrong_comes_with_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setenv("KHALA_MODELS", str(tmp_path / "Documents" / "models"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("khala_mlx.performance.machine.usable_memory", lambda: 10**9)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    told = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    fixes = "\n".join(told["fixes"])
    for part in ("libportaudio2", "KHALA_MODELS=", "iCloud", "--model demo"):
        assert part in fixes
    for name, extra in {"mutagen": "tags", "matplotlib": "plot", "pyloudnorm": "listen"}.items():
        assert f"khala-mlx[{extra}]" in told[name]
    assert "Fix: " in CliRunner().invoke(main, ["doctor"]).stdout


def test_a_folder_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.stderr
    assert "the folder this runs in is gone" in result.stdout
