"""The tree as a whole: what an import costs, which packages may import which, what is declared."""

from __future__ import annotations

import ast
import compileall
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from tests.house import PACKAGES, PROJECT, ROOT, USE_KERNELS, requirements, run


def test_import_kernels_loads_nothing_else() -> None:
    code = "import sys, kernels; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run(sys.executable, "-c", code).stdout.split())
    assert "kernels" in loaded
    assert not loaded & {"models", "dataload", "train", "bench", "triton", "torchvision", "flash_attn"}


def test_import_kernels_is_fast(tmp_path: Path) -> None:
    """Beyond `import torch`, in processor time (others may be busy on this machine), of modules that are compiled to
    bytecode, as installed ones are; the best of three. Python looks for garbage among torch's objects now and then (a tenth of
    a second): that is not ours."""
    clock = (
        "import gc, time, torch; gc.freeze(); start = time.process_time(); import kernels; "
        "print(time.process_time() - start)"
    )
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    compileall.compile_dir(tmp_path / "kernels", quiet=1)
    seconds = min(float(run(sys.executable, "-c", clock, cwd=tmp_path).stdout) for _ in range(3))
    assert seconds < 0.15


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_kernels_without_cuda_and_triton(platform: str) -> None:
    """Triton has no wheels for macOS and Windows: its import fails there, and so it does here."""
    block = f"import sys, torch; sys.modules['triton'] = None; sys.platform = {platform!r}\n"
    run(sys.executable, "-c", block + USE_KERNELS, CUDA_VISIBLE_DEVICES="")


# --- the rules of the tree ------------------------------------------------------------------------


def project_files() -> list[Path]:
    """Files that are in version control or would be."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a git checkout"
)
def test_no_file_is_over_one_mebibyte() -> None:
    files = project_files()
    assert ROOT / "pyproject.toml" in files
    assert [path.name for path in files if path.stat().st_size > 1 << 20] == []


@pytest.mark.parametrize("package", [*PACKAGES, "bench", "tests"])
def test_package_has_a_readme(package: str) -> None:
    text = (ROOT / package / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {package}") and len(text) > 300


def test_special_tokens_are_the_same_everywhere() -> None:
    from dataload import tokenizer
    from models import tokens

    names = ("PAD", "UNK", "BOS", "EOS", "MASK")
    assert [getattr(tokenizer, name) for name in names] == [0, 1, 2, 3, 4]
    assert [getattr(tokens, name) for name in names] == [0, 1, 2, 3, 4]


needs_import_linter = pytest.mark.skipif(
    importlib.util.find_spec("importlinter") is None, reason="needs import-linter: pip install -e '.[dev]'"
)
LINT_IMPORTS = Path(sysconfig.get_path("scripts")) / "lint-imports"


@needs_import_linter
def test_arrows_hold() -> None:
    run(LINT_IMPORTS, "--no-cache")


@needs_import_linter
@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/backend.py", "import models"),
        ("models/objectives.py", "import dataload"),
        ("dataload/batch.py", "import kernels"),
        ("models/objectives.py", "import train"),
        ("train/pretrain.py", "import bench"),
        ("train/pretrain.py", "import tests"),
    ],
)
def test_wrong_arrow_is_noticed(file: str, line: str, tmp_path: Path) -> None:
    for name in (*PACKAGES, "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as wrong:
        wrong.write(f"\n{line}\n")
    done = run(LINT_IMPORTS, "--no-cache", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout


# --- what is declared ---------------------------------------------------------------------------


def test_ranges() -> None:
    base = requirements()
    torch, triton = base["torch"].specifier, base["triton"]
    assert Version("2.11.0") in torch and Version("2.13.0") in torch and Version("2.10.1") not in torch
    assert Version("3.6.0") in triton.specifier and triton.marker is not None
    where = {
        ("linux", "x86_64"): True,
        ("linux", "aarch64"): True,
        ("darwin", "arm64"): False,
        ("win32", "AMD64"): False,
    }
    for (system, machine), wanted in where.items():
        assert triton.marker.evaluate({"sys_platform": system, "platform_machine": machine}) is wanted
    for requirement in (*base.values(), *requirements("test").values()):
        if requirement.marker is None or requirement.marker.evaluate():
            found = Version(metadata.version(requirement.name))
            assert requirement.specifier.contains(found, prereleases=True), (requirement.name, found)


# The extra that brings a package: it may only be imported where it is used.
OPTIONAL = {
    "av": "data",
    "imagehash": "data",
    "soundfile": "data",
    "soxr": "data",
    "aiohttp": "cloud",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "pycocoevalcap": "eval",
    "pycocotools": "eval",
    "pyarrow": "",  # reads img2dataset's tables of metadata where somebody has it
    "nvidia": "gpu",
    "flash_attn": "flash",
    "flash_attn_interface": "flash",
    "liger_kernel": "liger",
    "torchao": "torchao",
    "torchvision": "",  # its operator is faster where somebody has it
    "wandb": "wandb",
    "deepspeed": "deepspeed",
    "apex": "",  # NVIDIA's is no package of the index
    "amp_C": "",
}


def test_dependencies_are_what_is_imported() -> None:
    """What the packages import, anywhere in their files, is declared; and what is declared is imported."""
    imported = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    theirs = imported - set(sys.stdlib_module_names) - set(PACKAGES) - set(OPTIONAL)
    owners = metadata.packages_distributions()
    used = {owners.get(name, [name])[0].lower() for name in theirs}
    declared = set(requirements())
    assert used - declared == set()
    # torch imports these two when it is asked for torch.compile and for torch.utils.tensorboard
    assert declared - used - {"triton", "tensorboard"} == set()


def test_optional_packages_are_imported_only_where_they_are_used() -> None:
    """Every module, but those that a child process runs, can be imported with none of the extras."""
    code = f"""
import importlib, pkgutil, sys
apart = {{"dataload.decode.audio_av", "dataload.decode.video_packets"}}
for name in {sorted(OPTIONAL)}:
    sys.modules[name] = None
for package in {sorted(PACKAGES)}:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__") and module.name not in apart:
            importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_extras() -> None:
    extras = {name: set(requirements(name)) for name in PROJECT["project"]["optional-dependencies"]}
    assert set(extras) == {
        "data",
        "cloud",
        "eval",
        "onnx",
        "gpu",
        "flash",
        "deepspeed",
        "liger",
        "torchao",
        "wandb",
        "test",
        "dev",
    }
    assert extras["gpu"] == {"nvidia-dali-cuda130"}
    assert set(OPTIONAL.values()) - {""} <= set(extras)
    assert [name for name, needs in extras.items() if "flash-attn" in needs] == ["flash"]
    assert not any("apex" in needs for needs in extras.values()), "the index's apex is not NVIDIA's"
