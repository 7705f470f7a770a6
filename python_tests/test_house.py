"""The rules of the layout: who may import whom, how large a file may grow, which words do not become names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mote_ext"
MAX_LINES = 600
MAX_HEADER_LINES = 15

# Each room may import what stands before it, never what stands after it.
ROOMS = [
    {"_build", "allocator", "compat"},
    {"stages", "reference", "keyed", "jsonl"},
    {"config", "encoding", "digest"},
    {"ops", "_C"},
    {"linear", "context", "skinny"},
    {"routing", "markers", "inject"},
    {"generation"},
    {"capabilities", "prepare", "checkpoint", "model_card"},
    {"model", "inplace", "peft"},
    {"judges", "suites"},
    {"engine", "chains"},
    {"training"},
    {"evaluation"},
    {"serving"},
    {"cli"},
]
FREE_ROOMS = {"", "env"}  # the package itself shows names of all rooms; env runs where nothing can be imported
IMPORTERS_OF_THE_MODULE = {"ops", "engine"}

# A C++ folder, and the folders whose headers it may include.
INCLUDES = {
    "core": {"core"},
    "lora": {"core", "lora"},
    "attention": {"core", "attention"},
    "linear": {"core", "linear"},
    "engine": {"core", "engine"},
    "binding": {"core", "lora", "attention", "linear", "engine", "binding"},
    "simt": {"core", "lora", "simt", "binding"},
}
TORCH_HEADERS = re.compile(r'#include\s*[<"](torch|ATen|c10|pybind11|Python)\b')
ATEN_ALLOWED = re.compile(r"csrc/(lora|attention|linear)/(\w+_cpu|cpu_\w+)\.\w+")

FORBIDDEN_IN_NAMES = {"fast", "optimized", "optimised", "new", "v2", "helper", "helpers", "manager", "util", "utils"}
# Words of transformers that its users pass by name.
THEIR_NAMES = {"max_new_tokens"}


def files(*patterns):
    """Source files of the repository, without what is built or installed into it."""
    rooms = ("csrc", "mote_ext", "python_tests", "bench", "examples")
    found = [path for room in rooms for pattern in patterns for path in (ROOT / room).rglob(pattern)]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def name_of(path):
    return str(path.relative_to(ROOT))


PYTHON = files("*.py")
CPP = files("*.h", "*.cuh", "*.cu", "*.cpp")
MODULES = [path for path in PYTHON if PACKAGE in path.parents]


def room_of(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if room == "__init__" else room


def imports_of(path):
    """Full names of everything a module imports, relative imports resolved."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from mote_ext import _C` imports a module, `from mote_ext.ops import lora_delta` a name.
            yield from (f"{source}.{alias.name}" if source == "mote_ext" else source for alias in node.names)


def rooms_imported(path):
    for name in imports_of(path):
        if name.startswith("mote_ext."):
            yield name.split(".")[1]


def level(room):
    return next((index for index, rooms in enumerate(ROOMS) if room in rooms), None)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_import_goes_back(path):
    room = room_of(path)
    if room in FREE_ROOMS:
        return
    assert level(room) is not None, f"{name_of(path)}: a new room; give it a place in ROOMS"
    for imported in rooms_imported(path):
        if imported == room or level(imported) is None:
            continue
        assert level(imported) <= level(room), f"{name_of(path)} imports mote_ext.{imported}, which comes after it"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_compiled_module_has_two_importers(path):
    if "_C" in rooms_imported(path):
        assert room_of(path) in IMPORTERS_OF_THE_MODULE


def test_the_reference_imports_torch_only():
    assert {name.split(".")[0] for name in imports_of(PACKAGE / "reference.py")} == {"torch"}


@pytest.mark.parametrize("path", [p for p in CPP if p.parent.name != "csrc"], ids=name_of)
def test_includes_follow_the_arrows(path):
    room = path.relative_to(ROOT / "csrc").parts[0]
    text = path.read_text()
    for included in re.findall(r'#include\s*"(?:\.\./)*(\w+)/', text):
        if included in INCLUDES:
            assert included in INCLUDES[room], f"{name_of(path)} includes {included}/"
    if room not in ("binding", "simt") and not ATEN_ALLOWED.match(name_of(path)):
        assert not TORCH_HEADERS.search(text), f"{name_of(path)} includes a header of torch or Python"


@pytest.mark.parametrize("path", PYTHON + CPP, ids=name_of)
def test_a_file_is_short_and_says_what_it_is(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines; split it"
    if not lines:
        return
    if path.suffix == ".py":
        header = ast.get_docstring(ast.parse(path.read_text()), clean=False)
        assert header, "opens with a docstring: what it does, the mathematics, who calls it"
        assert len(header.splitlines()) <= MAX_HEADER_LINES
    elif not path.with_suffix(".h").exists() or path.suffix == ".h":  # a header speaks for its source file
        assert lines[0].startswith("//"), "opens with a comment: what it does, the mathematics, who calls it"


def names_in(path):
    yield from path.relative_to(ROOT).with_suffix("").parts
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg
    else:
        code = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|#include[^\n]*', "", path.read_text(), flags=re.DOTALL)
        yield from re.findall(r"\b(?:struct|class|enum class|namespace|void|auto|int|bool|float)\s+(\w+)", code)


@pytest.mark.parametrize("path", PYTHON + CPP, ids=name_of)
def test_words_that_do_not_become_names(path):
    for name in set(names_in(path)) - THEIR_NAMES:
        words = {word.lower() for word in re.split(r"_|(?<=[a-z0-9])(?=[A-Z])", name)}
        assert not words & FORBIDDEN_IN_NAMES, f"{name} in {name_of(path)}"


@pytest.mark.parametrize("path", PYTHON + CPP, ids=name_of)
def test_no_path_of_one_machine(path):
    assert not re.search(r"(?<![\w.:/<])/(?:home|root|work|tmp|Users)/", path.read_text())


def test_instances_of_kernels_are_few_and_empty():
    instances = files("instances/*.cu")
    assert len(instances) <= 40
    for path in instances:
        code = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("//")]
        assert len(code) <= 40, name_of(path)
