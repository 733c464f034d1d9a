"""The package as a whole: the wheel, what an import costs, the other `kernels`, the rules, and make."""

from __future__ import annotations

import ast
import base64
import compileall
import csv
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "models", "dataload", "train")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What `make test` or a shell hands down, and would make commands inside a test do something else.
NOT_INHERITED = {
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    "ARGS",
    "JOBS",
    "PYTHON",
    "TORCH",
    "PYTHONPATH",
}
USE_KERNELS = """
import torch, kernels
qkv = torch.randn(1, 9, 7, 3, 2, 16)
out = kernels.window_attention(qkv, window=4, shift=2)
torch.testing.assert_close(out, kernels.window_attention(qkv, window=4, shift=2, backend="reference"))
print(kernels.__file__)
"""


def run(
    *command: str | Path, cwd: Path = ROOT, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with `env` on top of the environment; a failure shows what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=inherited | env, capture_output=True, text=True, timeout=240)
    if check and done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def pip_install(python: Path, *wheels: Path) -> None:
    """Install wheels that lie on this disk into the environment of `python`, which has no pip of its own."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *wheels)


def unpack(wheel: Path, folder: Path) -> str:
    """What `pip install --target` does with a pure wheel; the folder, for PYTHONPATH."""
    zipfile.ZipFile(wheel).extractall(folder)
    return str(folder)


# --- the wheel ------------------------------------------------------------------------------------


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


# --- what an import costs and needs ---------------------------------------------------------------


def test_import_kernels_loads_nothing_else() -> None:
    code = "import sys, kernels; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run(sys.executable, "-c", code).stdout.split())
    assert "kernels" in loaded
    assert not loaded & {"models", "dataload", "train", "bench", "triton", "torchvision", "flash_attn"}


def test_import_kernels_is_fast(tmp_path: Path) -> None:
    """Beyond `import torch`, in processor time (others may be busy on this machine), of modules that are compiled to
    bytecode, as installed ones are; the best of three."""
    clock = (
        "import torch, time; start = time.process_time(); import kernels; print(time.process_time() - start)"
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


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    project = PROJECT["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


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
for name in {sorted(OPTIONAL)}:
    sys.modules[name] = None
for package in {sorted(PACKAGES)}:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__") and module.name not in {{"dataload.audio_av", "dataload.video_packets"}}:
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


# --- make -----------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make: apt-get install make")
# Stands for an interpreter: makes a "venv" by copying itself, notes what is asked of -m, answers whether
# torch is there (only once its pip has installed one), and gives every other -c to a real Python.
FAKE_PYTHON = """#!/bin/sh
[ "$1" = -m ] && echo "$*" >> "{log}"
case "$1 $2 $3 $4" in
    *"sys.exit(u.find_spec"*) [ -f "${{0%/*}}/has-torch" ] ;;
    "-m pip install torch"*) touch "${{0%/*}}/has-torch" ;;
    "-m venv "*)
        for folder; do :; done
        mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python" ;;
    "-c "*) exec "{real}" "$@" ;;
esac
"""


class Checkout:
    """A folder with the Makefile and fake interpreters; `make` runs in it with only those in sight."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.bin = folder, folder / "log", folder / "bin"
        self.bin.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        for tool in ("sh", "sed", "cat", "cp", "mkdir", "touch", "rm", "find", "echo"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))

    def interpreter(self, name: str, text: str = FAKE_PYTHON) -> None:
        path = self.bin / name
        path.write_text(text.format(log=self.log, real=sys.executable), encoding="utf-8")
        path.chmod(0o755)

    def make(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        self.log.write_text("", encoding="utf-8")
        return run(str(shutil.which("make")), *words, cwd=self.folder, check=check, PATH=str(self.bin))

    def asked(self) -> list[str]:
        """What was run by -m, but for the question whether pip is there."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line != "-m pip --version"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@needs_make
def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    targets = set(phony.split()) - {"FORCE"}
    assert {"pretrain", "test", "bench", "lint", "format"} <= targets
    listed = {line.split()[0] for line in run("make").stdout.splitlines() if line.startswith("  ")}
    assert listed == targets


@needs_make
def test_make_installs_torch_first_and_once(checkout: Checkout) -> None:
    checkout.interpreter("python3")
    checkout.make("pretrain", "ARGS=aurora-small --dry-run")
    assert checkout.asked() == [
        "-m venv --clear .venv",
        "-m pip install torch==2.13.0",
        "-m pip install --quiet -c .venv/constraints.txt -e .",
        "-m train.pretrain aurora-small --dry-run",
    ]

    checkout.make("pretrain")
    assert checkout.asked() == ["-m train.pretrain"], "the second time installs again"

    checkout.make("pretrain", "TORCH=torch==2.12.1")
    venv, torch, package, pretrain = checkout.asked()
    assert (venv, torch) == ("-m venv --clear .venv", "-m pip install torch==2.12.1")
    assert package == "-m pip install --quiet -c .venv/constraints.txt -e ."

    checkout.make("test", "ARGS=-k house")
    package, pytest_line = checkout.asked()
    assert package == "-m pip install --quiet -c .venv/constraints.txt -e .[test]", (
        "TORCH was chosen once, and stays"
    )
    assert pytest_line.startswith("-m pytest") and pytest_line.endswith("-k house")
    held = (checkout.folder / ".venv" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch_version = metadata.version("torch")
    minor = int(torch_version.split(".")[1])
    assert held == [
        f"torch=={torch_version}",
        f"torchvision==0.{minor + 15}.*",
        f"torchcodec==0.{minor}.*",
    ]


@needs_make
def test_make_lint_serves_the_tests_too(checkout: Checkout) -> None:
    checkout.interpreter("python3")
    checkout.interpreter("lint-imports", "#!/bin/sh\n")
    checkout.make("pretrain")
    (checkout.folder / ".venv" / "bin" / "lint-imports").symlink_to(checkout.bin / "lint-imports")
    checkout.make("lint")
    assert checkout.asked()[0].endswith("-e .[dev]")
    checkout.make("test")
    assert [line.split()[1] for line in checkout.asked()] == ["pytest"]


@needs_make
def test_make_takes_the_interpreter_that_runs(checkout: Checkout) -> None:
    """A pyenv shim exists and fails; an old Python runs and is too old; the third is taken."""
    checkout.interpreter("python3", "#!/bin/sh\nexit 127\n")
    checkout.interpreter("python3.12", '#!/bin/sh\ncase "$2" in *exit*) exit 1 ;; esac\necho 3.9\n')
    checkout.interpreter("python3.11")
    said = checkout.make("pretrain").stdout
    assert "Making .venv with python3.11" in said


@needs_make
def test_make_says_what_it_tried(checkout: Checkout) -> None:
    checkout.interpreter("python3", "#!/bin/sh\nexit 127\n")
    no_venv = '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\nexec "{real}" "$@"\n'
    checkout.interpreter("python3.12", no_venv)
    done = checkout.make("test", check=False)
    version = "{}.{}".format(*sys.version_info[:2])
    assert done.returncode == 2 and "Python 3.11 or newer" in done.stderr
    assert "python3 is not there, or does not run" in done.stderr
    assert f"apt-get install python{version}-venv" in done.stderr
    assert not (checkout.folder / ".venv").exists()


@needs_make
def test_make_keeps_an_own_torch(checkout: Checkout) -> None:
    checkout.interpreter("python3")
    refused = checkout.make("pretrain", "TORCH=own", check=False)
    assert refused.returncode == 2 and "python3 has no torch, and TORCH=own asks for one" in refused.stderr

    (checkout.bin / "has-torch").touch()
    checkout.make("pretrain", "TORCH=own")
    assert checkout.asked() == [
        "-m venv --clear --system-site-packages .venv",
        "-m pip install --quiet -c .venv/constraints.txt -e .",
        "-m train.pretrain",
    ]


@needs_make
def test_make_keeps_an_environment_that_it_finds(checkout: Checkout) -> None:
    checkout.interpreter("python3")
    run(checkout.bin / "python3", "-m", "venv", checkout.folder / ".venv", PATH=str(checkout.bin))
    (checkout.folder / ".venv" / "bin" / "has-torch").touch()
    checkout.make("pretrain")
    assert checkout.asked() == ["-m pip install --quiet -c .venv/constraints.txt -e .", "-m train.pretrain"]


def test_makefile_torch_is_in_the_range() -> None:
    (pinned,) = set(re.findall(r"TORCH:-torch==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert Version(pinned) in requirements()["torch"].specifier
