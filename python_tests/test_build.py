"""Building and importing as a user meets them: what the source archive holds, what is said when something is missing.

Nothing is compiled here. The decisions of the build are CMake scripts that run alone, and a broken installation is a
copy of the package's Python files beside a torch that is only a version number.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC_13_ARCHS = "75;80;86;87;88;89;90;100;103;110;120;121"


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


# ---- the source archive ----


@pytest.fixture(scope="module")
def archive_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    status, output = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder)
    assert status == 0, output
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_archive_holds_every_source(archive_names):
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "cmake", "mote_ext", "python_tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".h", ".in", ".cpp", ".cu", ".cuh", ".cmake", ".txt", ".md", ".py", ".pyi", ".typed"}
    ]
    top = ["CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py"]
    assert set(sources + top) <= archive_names


def test_archive_holds_nothing_built(archive_names):
    built = {".so", ".o", ".pyc", ".json"}
    assert [name for name in archive_names if Path(name).suffix in built and not name.startswith("bench/")] == []
    assert [name for name in archive_names if name.startswith(("build/", ".venv/"))] == []


# ---- CUDA or not ----


@pytest.fixture(scope="module")
def cmake():
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return shutil.which("cmake", path=places) or pytest.skip("cmake is not installed")


def nvcc_of(folder, release):
    """A program that answers as nvcc does when it is asked what it is."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_cuda_demanded_without_nvcc(cmake):
    status, output = run(cmake, "-DMOTE_CUDA=1", "-P", "cmake/cuda.cmake", CUDACXX="/no/such/nvcc")
    assert status != 0
    assert "MOTE_CUDA=1, but no nvcc found (CUDACXX=/no/such/nvcc)" in " ".join(output.split())


def test_cuda_left_out_without_nvcc(cmake):
    status, output = run(cmake, "-DMOTE_CUDA=auto", "-P", "cmake/cuda.cmake", CUDACXX="/no/such/nvcc")
    assert status == 0
    assert "CUDA left out: no nvcc found" in output


def test_cuda_switch_has_three_positions(cmake):
    status, output = run(cmake, "-DMOTE_CUDA=yes", "-P", "cmake/cuda.cmake")
    assert status != 0
    assert "MOTE_CUDA must be auto, 1 or 0, got 'yes'" in output


@pytest.mark.parametrize("switch", ["auto", "1"])
def test_nvcc_of_another_major_than_torch(cmake, tmp_path, switch):
    nvcc = nvcc_of(tmp_path, "12.8")
    torch = ["-DMOTE_TORCH_VERSION=2.13.0+cu130", "-DMOTE_TORCH_CUDA=13.0"]
    status, output = run(cmake, f"-DMOTE_CUDA={switch}", *torch, "-P", "cmake/cuda.cmake", CUDACXX=str(nvcc))
    output = " ".join(output.split())
    assert status != 0
    assert "is CUDA 12.8, but torch 2.13.0+cu130 was built with CUDA 13.0" in output
    assert "MOTE_CUDA=0" in output


@pytest.mark.parametrize(
    ("requested", "known", "cmake_archs", "names"),
    [
        ("", NVCC_13_ARCHS, "80-real;90-real;100-real;100-virtual", "8.0 9.0 10.0+PTX"),
        ("", "50;80;86;90", "80-real;90-real;90-virtual", "8.0 9.0+PTX"),
        ("8.0;9.0", NVCC_13_ARCHS, "80-real;90-real", "8.0 9.0"),
        ("8.0 9.0+PTX", NVCC_13_ARCHS, "80-real;90-real;90-virtual", "8.0 9.0+PTX"),
        ("9.0a, 12.0", NVCC_13_ARCHS, "90a-real;120-real", "9.0a 12.0"),
        ("7.5 8.6 12.0+PTX", NVCC_13_ARCHS, "86-real;120-real;120-virtual", "8.6 12.0+PTX"),
        (" 9.0 ", NVCC_13_ARCHS, "90-real", "9.0"),
    ],
)
def test_architectures(cmake, requested, known, cmake_archs, names):
    status, output = run(cmake, f"-DARCHS={requested}", f"-DKNOWN={known}", "-P", "cmake/cuda_archs.cmake")
    assert status == 0, output
    assert output.splitlines()[-1] == f"{cmake_archs}|{names}"


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("Hopper", "expected entries such as 8.0, 9.0a or 10.0+PTX, got 'Hopper'"),
        ("90", "expected entries such as 8.0, 9.0a or 10.0+PTX, got '90'"),
        ("9.9", "this nvcc cannot compile for 9.9; it knows 75;80"),
        ("7.5", "no architecture of 8.0 or later in '7.5'"),
    ],
)
def test_architectures_refused(cmake, requested, message):
    status, output = run(cmake, f"-DARCHS={requested}", f"-DKNOWN={NVCC_13_ARCHS}", "-P", "cmake/cuda_archs.cmake")
    assert status != 0
    assert message in " ".join(output.split())


# ---- a build environment without torch ----


def test_isolated_build_says_what_to_run(tmp_path):
    arguments = ["setup.py", "-q", "dist_info", "--output-dir", str(tmp_path)]
    without_torch = (
        f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {arguments}; runpy.run_path('setup.py')"
    )
    status, output = run(sys.executable, "-c", without_torch)
    assert status != 0
    assert "there is no torch in this build environment" in output
    assert "pip install --no-build-isolation ." in output


# ---- importing ----


@pytest.fixture
def installation(tmp_path):
    """A folder with the Python files of the package, nothing compiled; put_* add the rest."""
    shutil.copytree(ROOT / "mote_ext", tmp_path / "mote_ext", ignore=shutil.ignore_patterns("*.so", "*.json"))
    return tmp_path


def put_torch(installation, version):
    (installation / "torch").mkdir()
    (installation / "torch" / "__init__.py").write_text(f"__version__ = '{version}'\n")


def put_module(installation, built_for, source=""):
    (installation / "mote_ext" / "_C.py").write_text(source)
    (installation / "mote_ext" / "_build_info.json").write_text(json.dumps({"torch": built_for}))


def import_error(installation):
    # -S: without the packages of this Python, so that only what the test put there is found.
    status, output = run(sys.executable, "-S", "-c", "import mote_ext", cwd=installation, PYTHONPATH=str(installation))
    assert status != 0
    assert "pip install --no-build-isolation" in output
    return output.partition("ImportError: ")[2]


def test_import_without_torch(installation):
    put_module(installation, built_for="2.13.0")
    assert "mote_ext needs PyTorch" in import_error(installation)


def test_import_without_compiled_module(installation):
    put_torch(installation, "2.13.0")
    message = import_error(installation)
    assert "its compiled module for Python" in message and "is missing" in message


def test_import_of_a_module_for_another_torch(installation):
    put_torch(installation, "2.13.0")
    put_module(installation, built_for="2.12.1+cu130", source="raise SystemExit('must not be opened')")
    message = import_error(installation)
    assert "built for torch 2.12.1+cu130, but torch 2.13.0 is installed" in message
    assert "must not be opened" not in message


def test_import_of_a_module_that_does_not_open(installation):
    put_torch(installation, "2.13.0")
    put_module(installation, built_for="2.13.0", source="raise ImportError('undefined symbol: _ZN1c')")
    assert "cannot be opened: undefined symbol: _ZN1c" in import_error(installation)


def test_import_starts_no_cuda():
    status, output = run(sys.executable, "-c", "import mote_ext, torch; assert not torch.cuda.is_initialized()")
    assert status == 0, output


def test_module_and_file_tell_the_same():
    from mote_ext import _C, _build

    assert _C.build_info() == _build.build_facts()


# ---- python -m mote_ext.env ----


def test_env_tells_versions_and_cuda():
    from mote_ext import _build

    status, output = run(sys.executable, "-m", "mote_ext.env")
    assert status == 0, output
    lines = dict(line.split("  ", 1) for line in output.splitlines() if not line.startswith(" "))
    assert lines["compiled module"].strip() == "works"
    assert lines["built for torch"].strip() == _build.build_facts()["torch"]
    assert _build.build_facts()["cuda_archs"] in lines["CUDA kernels"]
    assert {"mote_ext", "python", "torch", "transformers", "GPUs"} <= lines.keys()


def test_env_runs_where_nothing_works(installation):
    command = [sys.executable, "-S", "-m", "mote_ext.env"]
    status, output = run(*command, cwd=installation, PYTHONPATH=str(installation))
    assert status == 0, output
    assert "mote_ext needs PyTorch" in output
    assert "unknown without torch" in output
