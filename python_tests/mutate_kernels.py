"""Does a test notice? Breaks the CUDA kernels in one place at a time and runs them on the host (csrc/simt).

    python python_tests/mutate_kernels.py [--sample N --seed S] [--list] [--only TEXT] [--jobs N]

A mutant is a copy of the sources in which one barrier or asynchronous wait is deleted, or one tail predicate or stage
selection is made true. It is killed when it does not build, when the trials of csrc/simt/asan_main.cpp fail, first
without and then with AddressSanitizer, or when they do not end. The exit status is 1 when a mutant survives that
is not in the table "Mutations that survive" of csrc/simt/README.md. Needs g++ or $CXX; neither torch nor a GPU.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ACCEPTED_IN = ROOT / "csrc" / "simt" / "README.md"
DEVICE_SOURCES = ("lora_device.cu", "instances/expand.cu", "instances/shrink.cu", "instances/wgrad.cu")
SEEDS = (1, 2)

COMPILER = os.environ.get("CXX", "g++")
COMMON = ["-std=c++20", "-DMOTE_SIMT", "-w", "-fsanitize=bounds", "-fno-sanitize-recover=all"]
FLAGS = {"plain": [*COMMON, "-O1"], "sanitized": [*COMMON, "-O1", "-g", "-fsanitize=address"]}


# ---- finding the places ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    path: Path  # relative to csrc
    function: str
    start: int
    end: int
    text: str  # what stands there
    replacement: str
    occurrence: int  # among equal texts of the function, from 1
    line: int

    @property
    def key(self):
        """What the table of survivors calls it: independent of line numbers."""
        return (self.path.name, self.function, self.text, self.occurrence)

    def __str__(self):
        number = f" ({self.occurrence})" if self.occurrence > 1 else ""
        becomes = f"-> {self.replacement}" if self.replacement else "deleted"
        return f"{self.path.name}:{self.line} {self.function}: {self.text}{number} {becomes}"


SYNCHRONISATION = re.compile(r"\b(?:__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^;]*?>\(\))(?=;)")
COMPARISON = re.compile(r" (<|>=|==) ")
SELECTION = re.compile(
    r"\b(?:is_stage|uses_shared|uses_expert|is_legal)\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
    r"|[\w.]*present(?:\(\))?(?:\[\w+\])? >> \w+ & 1"
)
NAMES_A_STAGE = re.compile(r"\b(?:ids?|expert|half|stage_ids|kSharedOnly|kBaseOnly|num_stages)\b")
# `if (row >= p.num_tokens) return;` is a tail predicate turned round.
LEAVES = re.compile(r"\)\s*(?:continue|return)\b")
FOR_HEADER = re.compile(r"\bfor \(")
# What a match stands behind when it is not code that a kernel runs.
CONSTANT = re.compile(r"^\s*(?:static_assert|(?:static |inline )?constexpr)\b[^\n]*\Z", re.MULTILINE)
SIGNATURE = re.compile(r"__(?:device|global)__[^;{]*\Z")
FUNCTION = re.compile(r"^__(?:device|global)__[^;{]*?\b([a-z]\w*)\((?=[^;{]*{)", re.MULTILINE)


def readable(code):
    """The same length, without comments and preprocessor lines; `::` is blanked, so that a colon ends an operand."""
    return re.sub(r"//[^\n]*|^#[^\n]*|::", lambda match: "_" * len(match.group()), code, flags=re.MULTILINE)


def end_of_brackets(code, start):
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(code)):
        depth += (code[i] == "(") - (code[i] == ")")
        if depth == 0:
            return i
    raise ValueError("unbalanced parentheses")


def comparison_bounds(code, start, end):
    """From the operator at [start, end) to the delimiters left and right of its operands."""
    left, depth = start, 0
    while depth or code[left - 1] not in "([&|;{}?:,=":
        left -= 1
        depth += (code[left] in ")]") - (code[left] in "([")
    right, depth = end, 0
    while depth or code[right] not in ")]&|;{}?:,=":
        depth += (code[right] in "([") - (code[right] in ")]")
        right += 1
    left += re.match(r"\s*(?:return\b)?[\s!]*", code[left:right]).end()
    return left, left + len(code[left:right].rstrip())


def comparisons(code):
    """(start, end, replacement) of every tail predicate and stage selection that is written as a comparison."""
    headers = [(match.start(), end_of_brackets(code, match.end() - 1)) for match in FOR_HEADER.finditer(code)]
    for match in COMPARISON.finditer(code):
        if any(start < match.start() < end for start, end in headers):
            continue
        start, end = comparison_bounds(code, *match.span())
        if CONSTANT.search(code[:start]) or "nullptr" in code[start:end]:
            continue
        if match[1] == "<":
            yield start, end, "true"
        elif match[1] == ">=" and LEAVES.match(code, end_of_brackets(code, code.rindex("if (", 0, start) + 3)):
            yield start, end, "false"
        elif NAMES_A_STAGE.search(code[start:end]):
            yield start, end, "true"


def places(code):
    for match in SYNCHRONISATION.finditer(code):
        yield match.start(), match.end(), ""
    yield from comparisons(code)
    for match in SELECTION.finditer(code):
        yield match.start(), match.end(), "true"


def find_mutants(csrc):
    mutants = []
    for path in (*sorted(csrc.glob("lora/*.cuh")), csrc / "lora" / "lora_device.cu"):
        if path.name == "intrinsics.cuh":  # simt stands in for it
            continue
        code = readable(path.read_text())
        functions = [(match.end(), match[1]) for match in FUNCTION.finditer(code)]
        seen = Counter()
        for start, end, replacement in sorted(set(places(code))):
            function = next((name for begin, name in reversed(functions) if begin <= start), None)
            if function is None or SIGNATURE.search(code[:start]):
                continue
            text = " ".join(code[start:end].split())
            seen[function, text] += 1
            line = code.count("\n", 0, start) + 1
            place = (path.relative_to(csrc), function, start, end)
            mutants.append(Mutant(*place, text, replacement, seen[function, text], line))
    return mutants


# ---- building and running --------------------------------------------------------------------------------------------


class Build:
    """The unbroken program with one set of flags; a mutant compiles only the sources that include its file."""

    def __init__(self, csrc, folder, flags):
        self.flags = flags
        folder.mkdir()
        self.objects = {}  # source relative to csrc -> object
        for source in (*(f"lora/{name}" for name in DEVICE_SOURCES), "simt/simt.cpp", "simt/asan_main.cpp"):
            self.objects[source] = folder / (source.replace("/", "_") + ".o")
            self._compile(csrc, source, self.objects[source])
        self.program = folder / "trials"
        self._link(self.objects.values(), self.program)

    def _compile(self, csrc, source, target):
        is_kernel = source.endswith(".cu")
        # simt and the trials are the same for all mutants: compiled once, with more optimisation.
        extra = ["-x", "c++", "-include", str(csrc / "simt" / "simt.h")] if is_kernel else ["-O2"]
        command = [COMPILER, *self.flags, f"-I{csrc}", *extra, "-MMD", "-c", str(csrc / source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def _link(self, objects, target):
        command = [COMPILER, *self.flags, *map(str, objects), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def _includes(self, source, path):
        return f"/{path} " in self.objects[source].with_suffix(".d").read_text().replace("\\\n", " ") + " "

    def program_of(self, mutant, csrc):
        """csrc holds the mutant's sources. Raises CalledProcessError when it does not build."""
        objects = dict(self.objects)
        folder = csrc.parent
        for source in self.objects:
            if source.startswith("lora/") and self._includes(source, mutant.path):
                objects[source] = folder / self.objects[source].name
                self._compile(csrc, source, objects[source])
        program = folder / "trials"
        self._link(objects.values(), program)
        return program


def run(program, seed, limit_s):
    """(why the trials fail, or None; seconds used). In processor time, as machines that test are busy."""
    limited = ["/bin/sh", "-c", 'ulimit -t "$0"; "$@"; status=$?; times >&2; exit $status', str(limit_s)]
    done = subprocess.run([*limited, str(program), str(seed)], capture_output=True, text=True, errors="replace")
    minutes, seconds = re.search(r"^(\d+)m([\d.]+)s \S+\s*\Z", done.stderr, re.MULTILINE).groups()
    return complaint_of(done), 60 * int(minutes) + float(seconds)


def complaint_of(done):
    if done.returncode == 0:
        return None
    error = re.search(r"AddressSanitizer: [\w-]+|runtime error: [^\n]*", done.stderr)
    if error:
        return error[0]
    if done.returncode > 128:  # as the shell reports a signal; SIGKILL comes at the limit of processor time
        name = signal.Signals(done.returncode - 128).name
        return "does not end" if name == "SIGKILL" else name
    return (done.stdout.strip().splitlines() or [f"exit {done.returncode}"])[-1]


class Trials:
    """The builds a mutant is tried in: each made, and run unbroken once, when a mutant first needs it."""

    def __init__(self, csrc, folder):
        self.csrc, self.folder = csrc, folder
        self.lock = threading.Lock()
        self.builds = {}  # name -> (Build, limit of a run in seconds)

    def build(self, name):
        with self.lock:
            if name not in self.builds:
                build = Build(self.csrc, self.folder / name, FLAGS[name])
                complaint, used_s = run(build.program, SEEDS[0], limit_s=1800)
                if complaint:
                    raise RuntimeError(f"the kernels fail before anything is broken ({name}): {complaint}")
                self.builds[name] = build, int(3 * used_s) + 10
            return self.builds[name]

    def verdict(self, mutant):
        """Why it is killed, or None."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            csrc = Path(folder) / "csrc"
            shutil.copytree(self.csrc, csrc)
            code = (csrc / mutant.path).read_text()
            (csrc / mutant.path).write_text(code[: mutant.start] + mutant.replacement + code[mutant.end :])
            for name in FLAGS:
                build, limit_s = self.build(name)
                try:
                    program = build.program_of(mutant, csrc)
                except subprocess.CalledProcessError:
                    return "does not build"
                for seed in SEEDS:
                    complaint, _ = run(program, seed, limit_s)
                    if complaint:
                        return complaint
        return None


# ---- the survivors' table --------------------------------------------------------------------------------------------


def accepted_survivors():
    """{key: reason} from rows `| file | function | text (occurrence) | reason |` below the table's heading."""
    section = ACCEPTED_IN.read_text().partition("## Mutations that survive")[2].partition("\n## ")[0]
    row = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`]+)`(?: \((\d+)\))? \| (.+?) \|$", re.MULTILINE)
    return {(m[1], m[2], m[3], int(m[4] or 1)): m[5] for m in row.finditer(section)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="try this many, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--only", default="", help="try those whose description contains this text")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()

    accepted = accepted_survivors()
    survivors = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # A copy: the sources may be edited while this runs.
        csrc = Path(folder) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("binding", "engine"))
        every_mutant = find_mutants(csrc)
        mutants = [mutant for mutant in every_mutant if options.only in str(mutant)]
        if options.sample is not None:
            mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
        if options.list:
            print(*mutants, sep="\n")
            return 0
        trials = Trials(csrc, Path(folder))
        with ThreadPoolExecutor(options.jobs) as pool:
            for number, (mutant, verdict) in enumerate(zip(mutants, pool.map(trials.verdict, mutants)), 1):
                if verdict is None:
                    survivors.append(mutant)
                outcome = "killed  " if verdict else "accepted" if mutant.key in accepted else "SURVIVES"
                print(f"[{number}/{len(mutants)}] {outcome} {mutant}  {verdict or ''}", flush=True)

    unexplained = [mutant for mutant in survivors if mutant.key not in accepted]
    stale = set(accepted) - {mutant.key for mutant in every_mutant}
    killed = len(mutants) - len(survivors)
    print(f"\n{killed} of {len(mutants)} mutants killed in {time.monotonic() - start:.0f} s, {len(survivors)} survive")
    for mutant in survivors:
        print(f"  {'accepted' if mutant.key in accepted else 'UNEXPLAINED'}  {mutant}")
    for key in sorted(stale):
        print(f"  no longer there, remove it from {ACCEPTED_IN.name}: {key}")
    return 1 if unexplained or stale else 0


if __name__ == "__main__":
    sys.exit(main())
