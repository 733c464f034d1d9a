"""Choosing a backend, explaining the choice, `python -m kernels`, and the other package that is called
kernels."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import kernels
from kernels import clash, explain, latent_attention, window_attention

ROOT = Path(kernels.__file__).resolve().parent.parent


def python(*args: str, path: Path = ROOT, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    if sys.platform == "win32":
        env["SYSTEMROOT"] = r"C:\Windows"
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=env, cwd=cwd, timeout=200
    )


def few() -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(2, 5, 3, 8) for _ in range(3))


def test_explain_says_which_backend_and_why_not_the_others() -> None:
    choice = explain(window_attention, torch.zeros(1, 8, 8, 3, 2, 8), window=4)
    assert choice.backend == "eager"
    assert set(choice.others) == {"reference", "sdpa", "triton", "flash_attn"}
    line = str(choice)
    assert "\n" not in line and line.startswith("window_attention: eager runs (")
    assert "triton: it runs on CUDA devices, got cpu" in line
    assert "flash_attn: FlashAttention knows neither windows nor a position bias" in line

    assert explain(latent_attention, *few()).backend == "eager"
    assert explain(latent_attention, torch.zeros(2, 1, 3, 8), *few()[1:]).backend == "sdpa"
    many = torch.zeros(1, 128, 1, 4)
    assert explain(latent_attention, many, many, many).backend == "sdpa"
    choice = explain(latent_attention, many, many, many, return_lse=True)
    assert choice.backend == "eager" and "log-sum-exp" in choice.others["sdpa"]
    # A tensor elsewhere is explained without being computed with.
    assert explain(window_attention, torch.zeros(1, 8, 8, 3, 2, 8, device="meta"), window=4).backend == "sdpa"


def test_explain_answers_for_a_named_backend() -> None:
    assert explain(latent_attention, *few(), backend="reference").backend == "reference"
    choice = explain(latent_attention, *few(), backend="sdpa", dropout_p=0.1, return_lse=True)
    assert choice.backend is None
    assert "no log-sum-exp" in choice.reason and "takes no seed" in choice.reason
    assert "nothing runs" in str(choice)
    assert explain(latent_attention, *few(), backend="triton").backend is None
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        explain(latent_attention, *few(), backend="cuda")
    with pytest.raises(ValueError, match="window must be from 1"):
        explain(window_attention, torch.zeros(1, 8, 8, 3, 2, 8), window=9)
    with pytest.raises(
        ValueError, match="'merge_attention' has no backends.*window_attention, latent_attention"
    ):
        explain(kernels.merge_attention, [], [])


def test_auto_runs_what_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.window_attention import op

    ran = []
    for name, function in list(op.BACKEND_FUNCTIONS.items()):
        monkeypatch.setitem(
            op.BACKEND_FUNCTIONS, name, lambda *a, n=name, f=function: (ran.append(n), f(*a))[1]
        )
    qkv = torch.zeros(1, 8, 8, 3, 2, 8)
    window_attention(qkv, window=4)
    assert ran == [explain(window_attention, qkv, window=4).backend]
    for name in ("reference", "eager", "sdpa"):
        window_attention(qkv, window=4, backend=name)
        assert ran[-1] == name


def test_available_backends() -> None:
    table = kernels.available_backends()
    assert set(table) == {"window_attention", "latent_attention", "linear_cross_entropy", "contrastive_loss"}
    for loss in (table.pop("linear_cross_entropy"), table.pop("contrastive_loss")):
        assert [name for name, why in loss.items() if why is None] == ["reference", "eager"]
    for backends in table.values():
        assert [name for name, why in backends.items() if why is None] == ["reference", "eager", "sdpa"]


def test_python_m_kernels() -> None:
    done = python("-m", "kernels")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    assert any(line.startswith("CUDA: ") for line in lines) and any(
        "package triton: " in line for line in lines
    )
    start = lines.index("window_attention")
    assert [line.split()[:2] for line in lines[start + 1 : start + 4]] == [
        ["reference", "available"],
        ["eager", "available"],
        ["sdpa", "available"],
    ]
    assert "triton      not available: it runs on CUDA devices, got cpu" in done.stdout


def test_import_is_light() -> None:
    """No compiler, no Triton, no CUDA, nothing of ours but itself; and under torch's own import time
    again."""
    done = python(
        "-c",
        "import json, sys, time; import torch; before = set(sys.modules); start = time.process_time(); import kernels;"
        "took = time.process_time() - start; new = set(sys.modules) - before;"
        "print(json.dumps([took, sorted(new), torch.cuda.is_initialized()]))",
    )
    assert done.returncode == 0, done.stderr
    took, new, cuda = json.loads(done.stdout)
    heavy = ("triton", "torch._dynamo", "torch._inductor", "models", "dataload", "train", "bench", "numpy")
    assert not [module for module in new if module.startswith(heavy)]
    assert not cuda and took < 1.0


# ---- the other package of this name
# ---------------------------------------------------------------------------------


def install_other(folder: Path) -> None:
    """What pip leaves of another distribution named kernels."""
    (folder / "kernels-9.9.dist-info").mkdir(parents=True)
    (folder / "kernels-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n"
    )
    (folder / "kernels").mkdir(exist_ok=True)
    (folder / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")


def test_no_warning_without_the_other_package() -> None:
    if clash.other_distribution() is not None:
        pytest.skip("another distribution named kernels is installed here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clash.warn_if_installed(ROOT / "kernels")


def test_one_warning_where_both_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_other(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="is hidden by this one") as caught:
        clash.warn_if_installed(ROOT / "kernels")
    assert (
        len(caught) == 1 and str(tmp_path) in str(caught[0].message) and str(ROOT) in str(caught[0].message)
    )
    with pytest.warns(UserWarning, match="files of the two are mixed"):
        clash.warn_if_installed((tmp_path / "kernels").resolve())


def test_a_name_of_the_other_package_is_explained() -> None:
    """transformers asks for such names after seeing the distribution's metadata, and catches ImportError."""
    with pytest.raises(
        ImportError, match=r"kernels\.get_kernel` belongs to Hugging Face's .* own virtual environment"
    ):
        from kernels import get_kernel  # noqa: F401
    assert not hasattr(kernels, "no_such_thing")
    with pytest.raises(
        AttributeError, match=r"module 'kernels' \(AuroraIO's, in .*\) has no attribute 'nothing'"
    ):
        kernels.nothing  # noqa: B018


def test_our_files_under_their_init_are_refused(tmp_path: Path) -> None:
    """pip unpacked both into one folder, and theirs came last."""
    install_other(tmp_path)
    for name in ("backend.py", "clash.py"):
        (tmp_path / "kernels" / name).write_bytes((ROOT / "kernels" / name).read_bytes())
    done = python("-c", "import kernels.backend", path=tmp_path, cwd=tmp_path)
    assert done.returncode != 0
    assert (
        "ImportError: `kernels` was imported from" in done.stderr
        and "is not AuroraIO's package" in done.stderr
    )


def test_theirs_first_on_the_path_is_seen_by_the_marker() -> None:
    assert kernels.__auroraio__ is True
    clash.check_marker(kernels)
    with pytest.raises(ImportError, match="which is not AuroraIO's"):
        clash.check_marker(json)
