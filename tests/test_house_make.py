"""make: what it installs, in which order, with which Python, and what it says where it cannot."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.house import ROOT, requirements, run

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
    *'get_path("purelib")'*) echo "${{0%/*}}" ;;
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
        for tool in ("sh", "sed", "cat", "cp", "mkdir", "touch", "rm", "find", "echo", "sleep"):
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
    commands, others = re.findall(r"^(?:COMMANDS|TARGETS) +:= (.*)$", text, flags=re.MULTILINE)
    targets = {*commands.split(), *others.split()} - {"$(COMMANDS)"}
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
    found = (checkout.folder / ".venv" / "bin" / "own-torch.pth").read_text(encoding="utf-8").strip()
    assert Path(found) / "torch" / "__init__.py" == Path(torch.__file__)


@needs_make
def test_make_keeps_an_environment_that_it_finds(checkout: Checkout) -> None:
    checkout.interpreter("python3")
    run(checkout.bin / "python3", "-m", "venv", checkout.folder / ".venv", PATH=str(checkout.bin))
    (checkout.folder / ".venv" / "bin" / "has-torch").touch()
    own = checkout.folder / ".venv" / "pip.conf"
    own.write_text("[global]\nindex-url = https://pypi.example/simple\n", encoding="utf-8")
    checkout.make("pretrain")
    assert checkout.asked() == ["-m pip install --quiet -c .venv/constraints.txt -e .", "-m train.pretrain"]
    assert own.read_text(encoding="utf-8") == "[global]\nindex-url = https://pypi.example/simple\n"


@needs_make
def test_make_refuses_a_word_that_is_no_target(checkout: Checkout) -> None:
    """Before anything starts: make alone would run pretrain, and say only then that it knows no aurora-photos."""
    checkout.interpreter("python3")
    for words, answer in (
        (["pretrain", "aurora-photos"], "no target 'aurora-photos': type make pretrain ARGS='aurora-photos'"),
        (["pretrain", "aurora-photos", "ARGS=--seed 3"], "type make pretrain ARGS='aurora-photos --seed 3'"),
        (["pretrian"], "no target 'pretrian': make help lists them"),
        (["lint", "kernels"], "no target 'kernels': make help lists them"),
        (["pretrain", "steps=10"], "steps=10 is nothing that make reads: write ARGS='--steps 10'"),
        (["pretrain", "name=x", "ARGS=aurora-small"], "write ARGS='aurora-small --name x'"),
        (["pretrain", "a'b=3"], "a'b=3 is nothing that make reads"),
    ):
        done = checkout.make(*words, check=False)
        assert done.returncode == 2 and answer in done.stderr and len(done.stderr.splitlines()) == 1
        assert not checkout.asked() and not done.stdout and not (checkout.folder / ".venv").exists()


@needs_make
def test_make_takes_variables_that_others_read(checkout: Checkout) -> None:
    """pip reads proxies; an outer make hands its own variables down."""
    checkout.interpreter("python3")
    checkout.make("-n", "pretrain", "https_proxy=http://p:1")
    (checkout.folder / "outer").mkdir()
    (checkout.folder / "outer/Makefile").write_text("all:\n\t$(MAKE) -n -C .. pretrain\n", encoding="utf-8")
    assert "train.pretrain" in checkout.make("-C", "outer", "prefix=/usr").stdout


@needs_make
def test_make_installs_one_thing_at_a_time(checkout: Checkout) -> None:
    """Whatever -j says, as two pips would write into one .venv: with -j the second would begin while the first sleeps."""
    checkout.interpreter("python3", FAKE_PYTHON.replace("*) exec", "*) sleep 0.05; exec"))
    checkout.make("-j4", "pretrain", "test")
    together = checkout.asked()
    shutil.rmtree(checkout.folder / ".venv")
    checkout.make("pretrain", "test")
    assert together == checkout.asked() and len(together) > 4


@needs_make
def test_make_holds_torch_for_every_pip(tmp_path: Path) -> None:
    """The pip.conf of .venv names the constraints by a path that pip can read, and follows a checkout that moves."""
    pytest.importorskip("pip", reason="needs pip: python -m ensurepip")
    folder = tmp_path / "a folder, 100% é"
    folder.mkdir()
    checkout = Checkout(folder)
    checkout.interpreter("python3")
    checkout.make("pretrain")
    constraints, conf = folder / ".venv" / "constraints.txt", folder / ".venv" / "pip.conf"
    assert conf.read_text(encoding="utf-8").splitlines()[1:] == [
        "[install]",
        f"constraint = {constraints.as_uri()}",
    ]
    assert refused_by_pip(conf, constraints)

    checkout.folder = folder.rename(tmp_path / "moved")
    folder.symlink_to(checkout.folder)  # the fake interpreter's log has the old path
    checkout.make("pretrain")
    assert checkout.asked() == ["-m train.pretrain"], "a move is no reason to install again"
    constraints, conf = (checkout.folder / ".venv" / name for name in ("constraints.txt", "pip.conf"))
    assert conf.read_text(encoding="utf-8").splitlines()[-1] == f"constraint = {constraints.as_uri()}"

    conf.unlink()  # as `venv --clear` does
    checkout.make("pretrain", "TORCH=torch==2.12.1")
    assert constraints.read_text(encoding="utf-8").startswith("torch==")
    assert refused_by_pip(conf, constraints)


def refused_by_pip(conf: Path, constraints: Path) -> bool:
    """Whether the real pip, told so by the constraints that conf names, refuses what is installed."""
    constraints.write_text("packaging==0\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--dry-run", "packaging")
    done = run(*pip, check=False, PIP_CONFIG_FILE=str(conf), PIP_CONSTRAINT="")
    return done.returncode == 1 and "(constraint) packaging==0" in done.stdout + done.stderr


def test_makefile_torch_is_in_the_range() -> None:
    (pinned,) = set(re.findall(r"TORCH:-torch==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert Version(pinned) in requirements()["torch"].specifier
