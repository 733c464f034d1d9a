"""A file that crashes, hangs or bloats its decoder costs one sample; answers are never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dataload.broken import BrokenSample
from dataload.sandbox import Sandbox, SandboxError

HERE = "tests.sandboxed:"
MANY = 8


class BrokenThing(BrokenSample):
    pass


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1, memory=256 << 20) as made:
        yield made


def pid(sandbox: Sandbox) -> int:
    return sandbox.call(HERE + "process", timeout=10)


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def gone(process: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(process)


VALUES = [
    None, True, -3, 2**40, 1.5, "é", b"", b"\0\xff", [], (1, [2, (3,)]), {"a": {"b": b"c"}, "list": [1], "array": 2},
]  # fmt: skip


def test_values_come_back_as_they_went(sandbox: Sandbox) -> None:
    assert sandbox.call("builtins:list", VALUES, timeout=10) == VALUES
    assert type(sandbox.call("builtins:tuple", (1, (2,)), timeout=10)[1]) is tuple


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::2].transpose(1, 0, 2),
        np.zeros((3, 0, 2), np.float32),
        np.array(2.5),
        np.array([np.nan, np.inf, -0.0]),
        np.array([True, False]),
    ],
    ids=["strided", "empty", "scalar", "floats", "bools"],
)
def test_arrays_come_back_as_they_went(sandbox: Sandbox, array: np.ndarray) -> None:
    back = sandbox.call("numpy:asarray", array, timeout=10)
    assert back.dtype == array.dtype and back.shape == array.shape
    assert np.ascontiguousarray(back).tobytes() == np.ascontiguousarray(array).tobytes()
    assert back.flags.writeable


def test_a_large_array_both_ways(sandbox: Sandbox) -> None:
    array = np.arange(10_000_000, dtype=np.uint32)
    assert np.array_equal(sandbox.call(HERE + "double", array, timeout=30), array * 2)


@pytest.mark.parametrize("bad", [object(), {1: 2}, np.array(["text"]), {1, 2}], ids=type)
def test_what_cannot_be_sent_is_refused_before_anything_is(sandbox: Sandbox, bad: object) -> None:
    before = pid(sandbox)
    with pytest.raises(TypeError, match="cannot send"):
        sandbox.call("builtins:list", [bad], timeout=10)
    assert pid(sandbox) == before


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        ("crash", (), "SIGSEGV"),
        ("abort", (), "SIGABRT"),
        ("leave", (3,), "exit code 3"),
        ("leave", (0,), "exit code 0"),
        ("loop", (), "took longer than 0.5 s"),
        ("hold_the_lock", (60,), "took longer than 0.5 s"),
        ("bloat", (1 << 30,), "needs more than 256 MiB"),
    ],
)
def test_what_ends_a_child_is_a_broken_sample(
    sandbox: Sandbox, function: str, arguments: tuple[int, ...], says: str
) -> None:
    before, restarts = pid(sandbox), sandbox.restarts
    with pytest.raises(BrokenThing, match=says):
        sandbox.call(HERE + function, *arguments, timeout=0.5, broken=BrokenThing)
    assert not alive(before)
    assert pid(sandbox) != before, "the child was replaced"
    twice = function in ("crash", "abort", "leave")  # perhaps it was not the sample: a second child tries
    assert sandbox.restarts == restarts + 1 + twice


def test_the_limit_on_memory_leaves_room_for_what_fits(sandbox: Sandbox) -> None:
    assert sandbox.call(HERE + "bloat", 128 << 20, timeout=10) == 128 << 20


def test_a_broken_sample_keeps_its_message_and_the_child(sandbox: Sandbox) -> None:
    before = pid(sandbox)
    with pytest.raises(BrokenThing, match="^cut short$"):
        sandbox.call(HERE + "broken", "cut short", timeout=10, broken=BrokenThing)
    assert pid(sandbox) == before


def test_what_is_no_fault_of_the_sample_is_another_error(sandbox: Sandbox) -> None:
    before = pid(sandbox)
    with pytest.raises(SandboxError, match='(?s)bug.*KeyError: "not the sample\'s fault"'):
        sandbox.call(HERE + "bug", timeout=10)
    with pytest.raises(SandboxError, match="no_such_module"):
        sandbox.call("no_such_module:f", timeout=10)
    with pytest.raises(SandboxError, match="no_such_library"):
        sandbox.call(HERE + "abort", timeout=10, needs=["no_such_library"])
    with pytest.raises(SandboxError, match="cannot send object"):
        sandbox.call(HERE + "unsendable", timeout=10)
    assert pid(sandbox) == before


def test_a_child_ignores_ctrl_c_and_prints_into_the_void(sandbox: Sandbox) -> None:
    assert sandbox.call(HERE + "interrupt", timeout=10) == "still here"
    assert sandbox.call(HERE + "printing", timeout=10) == "said"


def framed(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Path()),
        struct.pack("<I", 1 << 31),
        framed({"tuple": ["ok", {"bytes": 1 << 40}]}),
        framed({"tuple": ["ok", {"bytes": -1}]}),
        framed({"tuple": ["ok", {"array": ["<f4", [1 << 40, 1 << 40]]}]}),
        framed({"tuple": ["ok", {"array": ["|O", [1]]}]}),
        framed({"tuple": ["ok", {"array": ["<f4", [-1]]}]}),
        framed({"tuple": ["ok"]}),
        framed({"pickle": "gASV"}),
        framed(7),
        struct.pack("<I", 200_000) + b'{"list":[' * 22_222 + b"  ",
    ],
    ids=[
        "pickle",
        "header",
        "bytes",
        "negative",
        "array",
        "objects",
        "shape",
        "pair",
        "tag",
        "number",
        "deep",
    ],
)
def test_a_child_that_has_gone_over_gets_nothing_from_its_parent(sandbox: Sandbox, data: bytes) -> None:
    before = pid(sandbox)
    with pytest.raises(BrokenThing, match="answered with|took longer"):
        sandbox.call(HERE + "answer_with", data, timeout=0.5, broken=BrokenThing)
    assert not alive(before), "it is not asked again"


def test_many_threads_share_few_children() -> None:
    with Sandbox(workers=2) as sandbox:
        found: dict[int, np.ndarray] = {}

        def work(number: int) -> None:
            for i in range(20):
                sent = np.full(1000 * number + i + 1, number)
                found[number, i] = np.array_equal(sandbox.call(HERE + "double", sent, timeout=30), 2 * sent)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(MANY)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(found) == 20 * MANY and all(found.values())
        children = {sandbox.call(HERE + "rest", 0.1, timeout=10) for _ in range(3)}
        assert len(children) <= 2 and sandbox.restarts == 0


def test_two_calls_run_at_once_and_one_crash_leaves_the_other_alone() -> None:
    with Sandbox(workers=2) as sandbox:
        result: list[int] = []
        other = threading.Thread(target=lambda: result.append(sandbox.call(HERE + "rest", 1.5, timeout=30)))
        other.start()
        with pytest.raises(BrokenSample, match="SIGSEGV"):
            sandbox.call(HERE + "crash", timeout=30)
        other.join()
        assert result and sandbox.restarts == 2  # the crash was tried twice


def test_closing_ends_children_and_calls_in_progress() -> None:
    sandbox = Sandbox()
    child = pid(sandbox)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            sandbox.call(HERE + "rest", 60.0, timeout=120)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.3)
    sandbox.close()
    thread.join(10)
    assert not thread.is_alive() and not alive(child)
    assert isinstance(errors[0], RuntimeError) and "closed" in str(errors[0])
    with pytest.raises(RuntimeError, match="closed"):
        pid(sandbox)
    sandbox.close()


def test_no_children_before_the_first_call_and_none_after_garbage_collection() -> None:
    sandbox = Sandbox(workers=4)
    assert not sandbox._children
    child = pid(sandbox)
    assert len(sandbox._children) == 1
    del sandbox
    assert gone(child, 5)


PARENT = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
from dataload.sandbox import Sandbox
s = Sandbox(workers=3)
def busy(function, *arguments):
    s.call("tests.sandboxed:" + function, *arguments, timeout=3.0)
print(s.call("tests.sandboxed:process", timeout=10), flush=True)
"""


def run_parent(rest: str) -> tuple[subprocess.Popen[str], list[int]]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT + rest], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    children = [int(parent.stdout.readline())]
    children += [int(n) for n in parent.stdout.readline().split()]
    return parent, children


KILLED = """
import time, os
def go(f, *a):
    t = threading.Thread(target=busy, args=(f, *a), daemon=True); t.start()
s.call("tests.sandboxed:rest", 0.0, timeout=5)
go("loop"); go("hold_the_lock", 60)
time.sleep(1.0)
print(*[c._process.pid for c in s._children], flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_no_orphans_after_the_parent_was_killed() -> None:
    parent, children = run_parent(KILLED)
    assert len(set(children)) >= 2 and all(alive(c) for c in children)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert parent.stdout is not None
    parent.stdout.close()
    # One is in an endless loop, one keeps its interpreter's lock: the kernel ends that one after timeout and grace.
    assert all(gone(c, 8) for c in set(children))


def test_ctrl_c_ends_a_parent_at_once_and_its_children_with_it() -> None:
    rest = "s.call('tests.sandboxed:rest', 60.0, timeout=90)"
    parent, children = run_parent(f"print(flush=True)\ntry: {rest}\nexcept KeyboardInterrupt: sys.exit(7)\n")
    time.sleep(0.3)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(10) == 7
    assert parent.stdout is not None
    parent.stdout.close()
    assert all(gone(c, 5) for c in children)


def test_a_forked_process_gets_children_of_its_own() -> None:
    program = PARENT + (
        "import os\n"
        "forked = os.fork()\n"
        "if forked == 0:\n"
        "    print(s.call('tests.sandboxed:process', timeout=10), flush=True); s.close(); os._exit(0)\n"
        "assert os.waitpid(forked, 0)[1] == 0\n"
        "print(s.call('tests.sandboxed:process', timeout=10))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    first, forked, again = done.stdout.split()
    assert first == again != forked


def test_a_child_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(SandboxError, match="cannot start"):
        Sandbox().call("operator:add", 1, 2, timeout=5)
    monkeypatch.undo()
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if "site-packages" not in path and "lib" in path]
    )
    with pytest.raises(SandboxError, match="(?s)starting.*exit code 1.*ModuleNotFoundError"):
        Sandbox().call("operator:add", 1, 2, timeout=5)


def test_numbers_of_workers() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        Sandbox(workers=0)
