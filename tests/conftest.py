"""What all tests share: real data, a browser, an oracle, and an environment apart from the user's own."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from bench.importing import make_torchvision_importable

if TYPE_CHECKING:
    from serving import Server

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# One run has several processes (workers of pytest-xdist, commands that tests start), so each takes one core.
THREADS = "1"
SCRATCH = pytest.StashKey[str]()
TORCHVISION = pytest.StashKey[object]()


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before anything imports torch; workers and subprocesses inherit it."""
    os.environ.setdefault("OMP_NUM_THREADS", THREADS)
    config.stash[TORCHVISION] = make_torchvision_importable()
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: its parent has done the rest
        return
    scratch = tempfile.mkdtemp(prefix="auroraio-tests-")
    config.stash[SCRATCH] = scratch
    os.environ |= {
        "XDG_CACHE_HOME": scratch,  # the built-in corpus, matplotlib's fonts, pip
        "MPLCONFIGDIR": f"{scratch}/matplotlib",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "MPLBACKEND": "Agg",
    }


def pytest_unconfigure(config: pytest.Config) -> None:
    if SCRATCH in config.stash:
        shutil.rmtree(config.stash[SCRATCH], ignore_errors=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that AURORAIO_TEST_DATA names; the test skips where it names none."""
    named = os.environ.get("AURORAIO_TEST_DATA", "")
    if not named:
        pytest.skip("needs real data: set AURORAIO_TEST_DATA to its folder")
    folder = Path(named).resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"AURORAIO_TEST_DATA={named!r}: no such folder ({folder})")
    return folder


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium or Chrome; the test skips where there is none."""
    for name in CHROMIUM_NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"needs a browser, none of {', '.join(CHROMIUM_NAMES)} is here: apt-get install chromium")


@pytest.fixture
def chromium_command(chromium: str, tmp_path: Path) -> list[str]:
    """Start of a command line: headless, with its own profile, no network. Append what it is to do."""
    return [
        chromium,
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        *(
            "--disable-quic",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ),
        f"--user-data-dir={tmp_path / 'chromium-profile'}",
    ]


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, an oracle, imported where `import torchvision` works too (see below)."""
    return importlib.import_module("timm")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what is read before it is written shows; random numbers are the same in every test."""
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses and timeouts, and a cache of the test's own."""
    monkeypatch.setattr("dataload.remote._PAUSE", 0.01)
    monkeypatch.setenv("AURORAIO_TIMEOUT", "5")
    monkeypatch.setenv("AURORAIO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of tmp_path/served, which get closed."""
    from serving import Server

    servers: list[Server] = []

    def serve(**options: bool) -> Server:
        folder = tmp_path / "served"
        folder.mkdir(exist_ok=True)
        servers.append(Server(folder, **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
