"""The three Java programs behind caption scores: the PTB tokenizer, METEOR, and SPICE.

The first two lie in pycocoevalcap. SPICE also needs Stanford CoreNLP 3.6.0 (about 400 MB), which nobody may download
in silence: the operator gives a directory with the two jars. The wrappers that come with pycocoevalcap are not used:
they write into their own folder, do not look whether a line was lost, and hang or fail without a reason.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

JAVA_OPTIONS = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")  # or the locale decides what captions are
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_MEMORY = "8G"
"""heap that SPICE asks for: it parses every caption"""
# What Stanford's tokenizer makes of punctuation; the official scores drop these.
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())


class JavaError(RuntimeError):
    """A Java program failed; the message has what it said."""


def package_folder() -> Path:
    """Where pycocoevalcap lies. ImportError, with what to install, where it is missing."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("caption scores need pycocoevalcap: pip install 'auroraio[eval]'")
    return Path(next(iter(spec.submodule_search_locations)))


_versions: dict[tuple[str, int], str] = {}
_meteors: dict[str, Meteor] = {}


def find_java() -> tuple[str | None, str]:
    """(path of a java that runs, its version), or (None, why there is none). One that ran is not asked again."""
    path = shutil.which("java")
    if path is None:
        return None, "there is no java (Debian, Ubuntu: apt-get install default-jre-headless)"
    place = path, os.stat(path).st_mtime_ns
    if place in _versions:
        return path, _versions[place]
    try:
        done = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{path} does not run: {error}"
    said = (done.stderr or done.stdout).strip().splitlines()
    if done.returncode or not said:
        return None, f"{path} does not run: {said[-1] if said else f'exit status {done.returncode}'}"
    _versions[place] = said[0]
    return path, said[0]


def missing_spice_jars(folder: Path | None) -> str:
    """Why SPICE cannot run with this directory of jars; empty = it can."""
    if folder is None:
        return f"no directory with {' and '.join(SPICE_JARS)} was given (--spice-jars DIR)"
    if not folder.is_dir():
        return f"--spice-jars {folder}: no such folder"
    missing = [name for name in SPICE_JARS if not (folder / name).is_file()]
    return f"{folder} lacks {' and '.join(missing)}" if missing else ""


def ptb_tokenize(java: str, lines: Sequence[str]) -> list[str]:
    """Lines as Stanford's PTB tokenizer splits them, in small letters, without punctuation; white space in them must be
    single spaces. Raises JavaError where the number of lines is not the same."""
    jar = package_folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    program = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        [java, *JAVA_OPTIONS, "-cp", str(jar), *program],
        input=text.encode("utf-8", "replace"),
        capture_output=True,
    )
    found = done.stdout.decode("utf-8", "replace").split("\n")
    if done.returncode or len(found) != len(lines) + 1 or found[-1]:
        raise JavaError(
            f"the PTB tokenizer ended with {done.returncode} and {len(found) - 1:,} lines for {len(lines):,}: "
            f"{_tail(done.stderr)}"
        )
    return [" ".join(word for word in line.split(" ") if word not in PUNCTUATION) for line in found[:-1]]


def meteor(java: str) -> Meteor:
    """METEOR, for all sets that this process scores: it takes seconds to start. It ends with this process, or by `close`;
    after it failed, the next call starts it anew."""
    found = _meteors.get(java)
    if found is None or not found.running:
        if found is not None:
            found.close()
        found = _meteors[java] = Meteor(java)
        atexit.register(found.close)
    return found


class Meteor:
    """A METEOR 1.5 process; `close` it."""

    def __init__(self, java: str) -> None:
        jar = package_folder() / "meteor" / "meteor-1.5.jar"
        options = ("-", "-", "-stdio", "-l", "en", "-norm")
        self._errors = (
            tempfile.TemporaryFile()
        )  # a pipe that no one reads can fill, and then all stands still
        self._process = subprocess.Popen(
            [java, *JAVA_OPTIONS, "-Xmx2G", "-jar", str(jar), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._between_sets = True

    @property
    def running(self) -> bool:
        """Whether it can be asked: it has not ended, and no answer of an earlier set is still to come."""
        return self._between_sets and self._process.poll() is None

    def score(
        self, candidates: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[float, list[float]]:
        """(score of the set, score of each candidate); all tokenised. Raises JavaError."""
        self._between_sets = False
        counted = [
            self._ask(" ||| ".join(["SCORE", *map(_one_line, texts), _one_line(candidate)]))
            for candidate, texts in zip(candidates, references, strict=True)
        ]
        first = self._ask(" ||| ".join(["EVAL", *counted]))
        said = [first, *(self._line() for _ in counted[1:]), self._line()]
        try:
            *each, whole = map(float, said)
        except ValueError as error:
            raise JavaError(f"METEOR gave no number: {error}") from None
        self._between_sets = True
        return whole, each

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise JavaError(f"METEOR went away ({error}): {self._said()}") from None
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise JavaError(f"METEOR stopped answering: {self._said()}")
        return line.decode().strip()

    def _said(self) -> str:
        self._errors.seek(0)
        return _tail(self._errors.read())

    def close(self) -> None:
        """Ends the process. A second time does nothing."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()


def spice(
    java: str,
    jars: Path,
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    memory: str = SPICE_MEMORY,
) -> dict[str, float]:
    """F score of each image's caption, by id. `jars`: the directory with CoreNLP. Raises JavaError.

    Runs without SPICE's cache, whose library does not work on Java 17, and outside of the package's folder.
    """
    folder = package_folder() / "spice"
    places = [
        folder / "spice-1.0.jar",
        *sorted((folder / "lib").glob("*.jar")),
        *(jars / n for n in SPICE_JARS),
    ]
    listed = [
        {"image_id": name, "test": candidates[name], "refs": list(references[name])} for name in candidates
    ]
    with _scratch() as scratch:
        given, found = scratch / "captions.json", scratch / "scores.json"
        given.write_text(json.dumps(listed), encoding="utf-8")
        program = ("edu.anu.spice.SpiceScorer", str(given), "-out", str(found), "-subset", "-silent")
        classes = os.pathsep.join(str(place.resolve()) for place in places)
        command = [java, *JAVA_OPTIONS, f"-Xmx{memory}", "-cp", classes, *program]
        done = subprocess.run(command, cwd=scratch, capture_output=True)
        if done.returncode or not found.is_file():
            killed = " (killed, which a lack of memory looks like)" if done.returncode in (-9, 137) else ""
            raise JavaError(
                f"SPICE ended with {done.returncode}{killed}; it asks for {memory} of memory. It said: "
                f"{_tail(done.stderr + done.stdout)}"
            )
        answers: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    try:
        scores = {str(answer["image_id"]): float(answer["scores"]["All"]["f"]) for answer in answers}
    except (KeyError, TypeError, ValueError) as error:
        raise JavaError(f"SPICE gave an answer without an F score: {type(error).__name__}: {error}") from None
    if scores.keys() != candidates.keys():
        raise JavaError(f"SPICE gave scores for {len(scores):,} images of {len(candidates):,}")
    return scores


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="auroraio-spice-") as folder:
        yield Path(folder)


def _one_line(text: str) -> str:
    return " ".join(text.replace("|||", " ").split())  # "|||" separates METEOR's fields


def _tail(said: bytes) -> str:
    return said.decode("utf-8", "replace").strip()[-600:] or "nothing"
