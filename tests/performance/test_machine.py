import mlx.core as mx
import pytest

from khala_mlx.errors import KhalaError
from khala_mlx.performance import machine
from khala_mlx.performance.machine import CHIPS, mac_with, parse_memory, this_machine, usable_of_mac

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16), ("16 GiB", 16), ("24", 24), ("0.5g", 0.5), (" 96gb ", 96)]
)
def test_memory_in_words(text: str, size: float) -> None:
    assert parse_memory(text) == size * GIB


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "lots", "nan", "inf", "16TB", "1e99"])
def test_wrong_memory(text: str) -> None:
    with pytest.raises(KhalaError, match="as in 16GB"):
        parse_memory(text)


def test_a_mac_leaves_a_part_to_its_gpu() -> None:
    assert usable_of_mac(24 * GIB) == 16 * GIB
    assert usable_of_mac(64 * GIB) == 48 * GIB
    assert mac_with(24 * GIB).memory == 16 * GIB
    assert not mac_with(GIB).on_cpu


def test_this_machine_has_rates() -> None:
    here = this_machine()
    assert here.on_cpu == (mx.default_device() == mx.cpu)
    assert here.memory > 2**28
    assert 1e8 < here.bandwidth < 1e13
    assert 1e8 < here.flops < 1e15
    assert here.name


def test_a_known_chip_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "chip_name", lambda: "Apple M3 Max")
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    here = this_machine()
    assert (here.bandwidth, here.flops, here.published) == (400e9, 14.1e12, True)


def test_every_generation_is_faster_or_as_fast() -> None:
    for kind in ("", " Pro", " Max", " Ultra"):
        chips = [CHIPS[f"M{n}{kind}"] for n in range(1, 6) if f"M{n}{kind}" in CHIPS]
        assert len(chips) >= 3
        assert all(bandwidth >= 68 and tflops > 2 for bandwidth, tflops in chips)


def test_a_new_gpu_is_probed_with_work_that_hides_its_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A simulated one of 600 GB/s and 17 TFLOPS that takes 0.2 ms to begin."""
    clock = [0.0]

    def work(result: mx.array, *inputs: mx.array) -> None:
        rows, columns = result.shape
        if not inputs:
            product = 2 * columns**3 / 17e12 if rows == columns else columns * 4096 / 600e9
            clock[0] += 2e-4 + product

    monkeypatch.setattr(machine, "chip_name", lambda: "Apple M9 Max")
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "eval", work)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])
    here = this_machine()
    assert not here.published
    assert here.bandwidth == pytest.approx(600e9, rel=0.15)
    assert here.flops == pytest.approx(17e12, rel=0.05)
