"""The wheel: what is in it, its use from another folder, and beside the other `kernels`, Hugging Face's."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house import PACKAGES, PROJECT, ROOT, USE_KERNELS, run


def pip_install(python: Path, *wheels: Path) -> None:
    """Install wheels that lie on this disk into the environment of `python`, which has no pip of its own."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *wheels)


def unpack(wheel: Path, folder: Path) -> str:
    """What `pip install --target` does with a pure wheel; the folder, for PYTHONPATH."""
    zipfile.ZipFile(wheel).extractall(folder)
    return str(folder)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network, from a copy: setuptools writes build/ beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES + ("bench", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip_wheel = ("-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    run(sys.executable, *pip_wheel, "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to everything installed here, torch among it, but for this project itself."""
    folder = tmp_path_factory.mktemp("dependencies")
    for place in [
        Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")
    ]:
        for item in place.iterdir():
            ours = "auroraio" in item.name or item.name in ("__pycache__", "kernels", *PACKAGES)
            if not ours and item.suffix != ".pth" and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item, target_is_directory=item.is_dir())
    return folder


def new_environment(folder: Path, dependencies: Path) -> Path:
    """Make an environment that sees `dependencies` after its own packages; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(site) / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    return python


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory: pytest.TempPathFactory, wheel: Path, dependencies: Path) -> Path:
    """Python of a clean environment with the wheel in it."""
    python = new_environment(tmp_path_factory.mktemp("clean") / "env", dependencies)
    pip_install(python, wheel)
    return python


def test_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"auroraio-{PROJECT['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    wanted = {".py", ".html", ".css", ".js", ".j2"}
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in wanted
    }
    assert in_tree - names == set(), "in the tree, not in the wheel"
    assert {f"{package}/__init__.py" for package in PACKAGES} <= names


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = archive.read(name).decode()
    head = text.split("\n\n", 1)[0]
    assert "Name: auroraio" in head
    assert "License-Expression: Apache-2.0" in head
    assert "Requires-Python: >=3.11" in head
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in text


def test_installed_wheel_from_another_folder(clean_python: Path, tmp_path: Path) -> None:
    done = run(clean_python, "-W", "error", "-c", USE_KERNELS, cwd=tmp_path)
    assert done.stdout.strip().startswith(str(clean_python.parent.parent)), "kernels came from somewhere else"
    table = run(clean_python, "-m", "kernels", cwd=tmp_path).stdout
    assert "window_attention" in table and "reference" in table


def test_installed_modules_all_import(clean_python: Path, tmp_path: Path) -> None:
    code = "import models, models.objectives, dataload.pipeline, dataload.pack, train.pretrain; print('fine')"
    assert run(clean_python, "-c", code, cwd=tmp_path).stdout.strip() == "fine"


# --- the other `kernels`, Hugging Face's ----------------------------------------------------------


def write_wheel(path: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """Write a minimal wheel by hand."""
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = io.StringIO()
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        csv.writer(rows, lineterminator="\n").writerow([file, f"sha256={digest}", len(text.encode())])
    files[f"{info}/RECORD"] = f"{rows.getvalue()}{info}/RECORD,,\n"
    target = path / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return target


@pytest.fixture(scope="session")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that looks like Hugging Face's `kernels`: the same name, its own functions."""
    files = {
        "kernels/__init__.py": "from kernels.layer import LayerRepository, get_kernel\n",
        "kernels/layer/__init__.py": "class LayerRepository: ...\n\n\ndef get_kernel(name): ...\n",
    }
    return write_wheel(tmp_path_factory.mktemp("other"), "kernels", "0.18.2", files)


def names_the_clash(text: str) -> bool:
    """Does a message say who the two are, and what to do?"""
    return "auroraio" in text.lower() and "Hugging Face" in text and "pip uninstall" in text


@pytest.fixture
def environment(tmp_path: Path, dependencies: Path) -> Path:
    return new_environment(tmp_path / "env", dependencies)


def test_ours_first_in_the_path_says_so(
    environment: Path, wheel: Path, other_kernels: Path, tmp_path: Path
) -> None:
    """As in a checkout, with theirs installed: ours works and warns; who asks for theirs is told why not."""
    pip_install(environment, other_kernels)
    ours = unpack(wheel, tmp_path / "ours")
    done = run(environment, "-c", USE_KERNELS, cwd=tmp_path, PYTHONPATH=ours)
    assert done.stdout.strip() == f"{ours}/kernels/__init__.py"
    assert names_the_clash(done.stderr), done.stderr
    code = "from kernels import get_kernel"
    refused = run(environment, "-W", "ignore", "-c", code, cwd=tmp_path, check=False, PYTHONPATH=ours)
    assert refused.returncode == 1 and names_the_clash(refused.stderr), refused.stderr


def test_theirs_first_in_the_path_is_refused(
    environment: Path, wheel: Path, other_kernels: Path, tmp_path: Path
) -> None:
    pip_install(environment, wheel)
    theirs = unpack(other_kernels, tmp_path / "theirs")
    for code in ("import models.aurora", "import train.pretrain"):
        done = run(environment, "-c", code, cwd=tmp_path, check=False, PYTHONPATH=theirs)
        assert done.returncode == 1 and names_the_clash(done.stderr), (code, done.stderr)
        assert f"{theirs}/kernels" in done.stderr, "does not say which one was found"


def test_both_in_one_folder_theirs_last_is_refused(
    environment: Path, wheel: Path, other_kernels: Path, tmp_path: Path
) -> None:
    """pip lets the second overwrite the first's files: their __init__.py lies over our modules."""
    for one in (wheel, other_kernels):
        pip_install(environment, one)
    for code in ("import models.aurora", "import kernels.window_attention.op"):
        done = run(environment, "-c", code, cwd=tmp_path, check=False)
        assert done.returncode == 1 and names_the_clash(done.stderr), (code, done.stderr)


def test_both_in_one_folder_ours_last_says_so(
    environment: Path, wheel: Path, other_kernels: Path, tmp_path: Path
) -> None:
    """Ours is whole then, and runs; the mixture is named, because removing either breaks the other."""
    for one in (other_kernels, wheel):
        pip_install(environment, one)
    done = run(environment, "-c", USE_KERNELS, cwd=tmp_path)
    assert names_the_clash(done.stderr) and "same folder" in done.stderr, done.stderr


def test_other_libraries_do_not_take_ours_for_theirs(clean_python: Path, tmp_path: Path) -> None:
    """transformers asks the metadata for a distribution `kernels`; ours must not look like one."""
    code = (
        "import importlib.metadata as m\n"
        "try:\n    print(m.version('kernels'))\nexcept m.PackageNotFoundError:\n    print('none')\n"
        "print(m.packages_distributions()['kernels'])"
    )
    assert run(clean_python, "-c", code, cwd=tmp_path).stdout.split("\n")[:2] == ["none", "['auroraio']"]
