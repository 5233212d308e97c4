"""Shared fixtures; also loads a fast BLAS, where there is one, before the first MLX import."""

import os
import signal
import subprocess
import sys
import tarfile
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from khala_mlx.errors import KhalaWarning
from khala_mlx.performance.blas import load as load_blas

sys.path.insert(0, str(Path(__file__).parent / "support"))

FIXTURES = Path(__file__).parent / "fixtures"


# KHALA_BLAS=off runs the tests with MLX's own BLAS, which is several times slower.
load_blas()

# A shell's background job, nohup and some CI systems ignore SIGINT, and children would inherit
# that. They get the default action back once this process handles the signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_children: "weakref.WeakSet[subprocess.Popen[Any]]" = weakref.WeakSet()


class _TrackedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """A child process that dies with the test that started it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        _children.add(self)


subprocess.Popen = _TrackedPopen  # type: ignore[misc]


@pytest.fixture(autouse=True)
def no_children_left() -> Iterator[None]:
    """Kill what a failed test leaves running."""
    yield
    for child in list(_children):
        if child.poll() is None:
            child.kill()
            child.wait()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests learn of this machine's pace is not for its users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KHALA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference set made by upstream's own code (tests/fixtures/README.md says how).

    KHALA_ORACLE names another one, of other sizes and seeds.
    """
    if given := os.environ.get("KHALA_ORACLE"):
        return Path(given)
    folder = tmp_path_factory.mktemp("oracle")
    with tarfile.open(FIXTURES / "setA.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "setA"


@pytest.fixture(scope="session", params=["single", "double"])
def reference(
    request: pytest.FixtureRequest, oracle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """(variant, Khala) of the reference checkpoints, converted in float32."""
    from khala_mlx import Khala
    from khala_mlx.convert import convert

    folder = tmp_path_factory.mktemp("converted") / request.param
    tokenizer = oracle / "tokenizer_small" / "tokenizer.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KhalaWarning)
        convert(
            oracle / "checkpoints",
            folder,
            dtype="float32",
            fc1_bias=request.param,
            tokenizer=tokenizer,
        )
    return request.param, Khala.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of tiny random weights."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Any:
    """A Khala of tiny random weights."""
    from khala_mlx import Khala

    return Khala.from_pretrained(tiny_folder)
