"""What setup.py decides, what it leaves in ``ctm_fast/lib``, and what the package makes of it.

Most tests run setup.py in a bare virtual environment on a copy of the tree, with stand-ins for torch, CMake, Ninja and
nvcc that are a few lines of text: the decisions are real, nothing is compiled and nothing is downloaded.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctm_fast import _libraries

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent

FAKE_CMAKE = """#!/bin/sh
echo "$@" >> "$LOG"
[ "$1" = --build ] || exit 0
mkdir -p "$2/ctm_fast/lib" && echo library > "$2/ctm_fast/lib/libctm_fast_ops.so"
"""


def plain_environment() -> dict[str, str]:
    """The variables of this run without those that choose kernels or modules."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("CTM_FAST", "TRITON", "PYTHON"))}


class Environment:
    """A virtual environment without torch, a copy of the tree, and a directory of commands, first on the path."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "tree"
        self.bin = directory / "bin"
        self.log = directory / "log"
        self.modules = directory / "modules"
        for path in (self.tree, self.bin, self.modules):
            path.mkdir()
        ignore = shutil.ignore_patterns("lib", "_C.*.so", "__pycache__")
        shutil.copytree(ROOT / "ctm_fast", self.tree / "ctm_fast", ignore=ignore)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.tree)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory / "venv")], check=True)
        (self.bin / "mkdir").symlink_to(str(shutil.which("mkdir")))  # what FAKE_CMAKE calls
        self.python = directory / "venv" / "bin" / "python"
        (self.site,) = (directory / "venv").glob("lib/python*/site-packages")
        for name in ("setuptools", "_distutils_hack", "pkg_resources"):
            package = importlib.util.find_spec(name)
            if package is not None and package.origin is not None:
                (self.modules / name).symlink_to(Path(package.origin).parent)
        (self.modules / "pybind11.py").write_text("def get_cmake_dir():\n    return 'pybind11-cmake'\n")

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def torch(self, version: str, cuda: str | None = None, directory: Path | None = None) -> Path:
        """Put a torch there that consists of its version."""
        directory = directory or self.site / "torch"
        directory.mkdir(parents=True)
        text = f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n"
        (directory / "version.py").write_text(text)
        return directory

    def tools(self) -> None:
        """Put a compiler, CMake and Ninja there that write one line each."""
        self.command("cmake", FAKE_CMAKE)
        self.command("ninja", "#!/bin/sh\n")
        self.command("c++", "#!/bin/sh\n")

    def setup(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run what an editable install runs; the path is that of the commands put there alone."""
        environment = {"PATH": str(self.bin), "PYTHONPATH": str(self.modules), "LOG": str(self.log)}
        return subprocess.run(
            [str(self.python), "setup.py", "-q", "build_ext", "--inplace"],
            cwd=self.tree,
            env=environment | {"CUDA_HOME": "/nowhere"} | variables,
            capture_output=True,
            text=True,
        )

    def note(self) -> dict[str, object]:
        return json.loads((self.tree / "ctm_fast" / "lib" / "build.json").read_text())

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the real Python, with the real torch, on the copy of the package."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.tree,
            env=plain_environment() | {"PYTHONPATH": str(self.tree)},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def assert_fails(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ctm_fast: ")
    for word in words:
        assert word in last


def test_without_torch_setup_says_in_one_line_what_to_run_and_tries_nothing(environment: Environment) -> None:
    environment.tools()
    result = environment.setup(CTM_FAST_BUILD="required")
    assert_fails(result, "there is none in", str(environment.site), "first run `pip install torch==2.13.0`")
    assert result.stdout + result.stderr == result.stderr.splitlines()[0] + "\n"
    assert not environment.log.exists()
    assert not (environment.tree / "build").exists()


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0", "unknown"])
def test_a_torch_that_is_too_old_is_refused(environment: Environment, version: str) -> None:
    environment.torch(version)
    assert_fails(environment.setup(), "needs torch 2.10 or later", version, "first run `pip install torch==2.13.0`")


@pytest.mark.parametrize("version", ["2.10.0", "2.11.0+cu130", "3.0.0a0+git123"])
def test_the_torch_of_the_environment_is_compiled_against(environment: Environment, version: str) -> None:
    directory = environment.torch(version)
    environment.tools()
    result = environment.setup()
    assert result.returncode == 0, result
    configure, build = environment.log.read_text().splitlines()
    assert f"-DCTM_FAST_TORCH={directory} -DCTM_FAST_TORCH_VERSION={version} " in configure
    assert f"-DPython_EXECUTABLE={environment.python}" in configure
    assert build.startswith("--build")


def test_a_torch_elsewhere_is_compiled_against_where_it_is_named(environment: Environment, tmp_path: Path) -> None:
    environment.torch("2.13.0")
    environment.tools()
    elsewhere = environment.torch("2.12.0", directory=tmp_path / "elsewhere")
    assert environment.setup(CTM_FAST_TORCH=str(elsewhere)).returncode == 0
    assert f"-DCTM_FAST_TORCH={elsewhere} -DCTM_FAST_TORCH_VERSION=2.12.0 " in environment.log.read_text()
    assert_fails(environment.setup(CTM_FAST_TORCH="/nowhere"), "CTM_FAST_TORCH: expected", "got /nowhere")


def test_what_was_built_is_written_down(environment: Environment) -> None:
    environment.torch("2.13.0+cpu")
    environment.tools()
    assert environment.setup().returncode == 0
    assert environment.note() == {
        "torch": "2.13.0+cpu",
        "built": ["libctm_fast_ops.so"],
        "architectures": [],
        "missing": {"cuda": "torch 2.13.0+cpu is built without CUDA"},
    }
    assert (environment.tree / "ctm_fast/lib/libctm_fast_ops.so").read_text() == "library\n"
    assert not list(environment.tree.rglob("*.partial"))


def test_without_a_compiler_the_package_installs_without_libraries_and_the_report_says_why(
    environment: Environment,
) -> None:
    environment.torch("2.13.0+cpu")
    environment.tools()
    stale = environment.tree / "ctm_fast/lib/libctm_fast_ops.so"
    stale.parent.mkdir()
    stale.write_text("of an earlier build")
    result = environment.setup(CXX="/nowhere/c++")
    assert result.returncode == 0, result
    reason = "no C++ compiler (looked for /nowhere/c++)"
    assert reason in result.stdout + result.stderr
    assert environment.note()["missing"] == {"cpu": reason, "cuda": reason}
    assert environment.note()["built"] == []
    assert not stale.exists()

    report = json.loads(environment.run("-m", "ctm_fast.report", "--json").stdout)
    assert report["libraries"]["libctm_fast_ops.so"] == f"not loaded: libctm_fast_ops.so was not built: {reason}"
    assert report["build"] == {"ctm_fast._C": "not built for this Python"}
    for op, row in report["ops"].items():
        assert row["cpu"]["kernel"] != "cpp"
        assert op == "attention" or reason in row["cpu"]["why_not"]["cpp"]
    assert reason in environment.run("-m", "ctm_fast.report").stdout


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_a_missing_build_tool_is_a_reason_too(environment: Environment, tool: str) -> None:
    environment.torch("2.13.0+cpu")
    environment.tools()
    (environment.bin / tool).unlink()
    result = environment.setup(PATH=str(environment.bin))
    assert result.returncode == 0, result
    assert environment.note()["missing"] == {"cpu": f"no {tool}", "cuda": f"no {tool}"}


def test_required_turns_a_missing_compiler_into_a_failure(environment: Environment) -> None:
    environment.torch("2.13.0+cpu")
    environment.tools()
    result = environment.setup(CXX="/nowhere/c++", CTM_FAST_BUILD="required")
    assert_fails(result, "CTM_FAST_BUILD=required, but no C++ compiler (looked for /nowhere/c++)")
    assert not list(environment.tree.rglob("build.json"))


def test_sources_that_do_not_compile_are_always_a_failure(environment: Environment) -> None:
    environment.torch("2.13.0+cpu")
    environment.tools()
    environment.command("cmake", FAKE_CMAKE + "exit 1\n")
    result = environment.setup()
    assert_fails(result, "does not compile, see above")
    assert not list(environment.tree.rglob("build.json"))


@pytest.mark.parametrize(("variable", "value"), [("CTM_FAST_BUILD", "always"), ("CTM_FAST_CUDA", "yes")])
def test_a_switch_with_a_value_it_does_not_have_is_an_error(
    environment: Environment, variable: str, value: str
) -> None:
    environment.torch("2.13.0+cpu")
    environment.tools()
    assert_fails(environment.setup(**{variable: value}), f"{variable}: expected", f"got '{value}'")


CUDA_13 = "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"
GPUS = "#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\n'\n"


@pytest.mark.parametrize(
    ("cuda", "commands", "variables", "expected"),
    [
        ("13.0", {"nvcc": CUDA_13, "nvidia-smi": GPUS}, {}, "80;90a"),
        ("13.2", {"nvcc": CUDA_13}, {"CTM_FAST_CUDA_ARCHS": "90a"}, "90a"),
        ("13.0", {"nvcc": CUDA_13, "nvidia-smi": GPUS}, {"CTM_FAST_CUDA_ARCHS": "86"}, "86"),
        (None, {"nvcc": CUDA_13, "nvidia-smi": GPUS}, {}, "torch 2.13.0 is built without CUDA"),
        (None, {"nvcc": CUDA_13}, {"CTM_FAST_CUDA": "1"}, "80;90a"),
        (None, {"nvcc": CUDA_13, "nvidia-smi": GPUS}, {"CTM_FAST_CUDA": "1", "CTM_FAST_CUDA_ARCHS": "90a"}, "90a"),
        ("13.0", {"nvcc": CUDA_13, "nvidia-smi": GPUS}, {"CTM_FAST_CUDA": "0"}, "switched off by CTM_FAST_CUDA=0"),
        ("13.0", {}, {}, "no nvcc (looked on the path and in /nowhere/bin)"),
        ("13.0", {"nvcc": CUDA_13}, {}, "no GPU is present and CTM_FAST_CUDA_ARCHS names no architecture"),
        ("12.8", {"nvcc": CUDA_13, "nvidia-smi": GPUS}, {}, "nvcc is of CUDA 13.0 and torch 2.13.0 of CUDA 12.8"),
    ],
)
def test_when_and_for_what_cuda_is_built(
    environment: Environment, cuda: str | None, commands: dict[str, str], variables: dict[str, str], expected: str
) -> None:
    environment.torch("2.13.0", cuda)
    environment.tools()
    for name, text in commands.items():
        environment.command(name, text)
    result = environment.setup(**variables)
    assert result.returncode == 0, result
    configure = environment.log.read_text().splitlines()[0]
    if re.fullmatch("[0-9a;]+", expected):
        assert f"-DCMAKE_CUDA_ARCHITECTURES={expected}" in configure
        assert f"-DCMAKE_CUDA_COMPILER={environment.bin / 'nvcc'}" in configure
        assert environment.note()["architectures"] == expected.split(";")
        assert environment.note()["missing"] == {}
    else:
        assert "CUDA" not in configure
        assert environment.note()["missing"] == {"cuda": expected}


@pytest.mark.parametrize(("cuda", "why"), [(None, "no nvcc"), ("12.8", "nvcc is of CUDA 13.0")])
def test_cuda_that_is_forced_and_cannot_be_built_is_a_failure(
    environment: Environment, cuda: str | None, why: str
) -> None:
    environment.torch("2.13.0", cuda)
    environment.tools()
    if cuda is not None:
        environment.command("nvcc", CUDA_13)
    assert_fails(environment.setup(CTM_FAST_CUDA="1"), f"CTM_FAST_CUDA=1, but {why}")


@pytest.mark.parametrize("content", ["not a library", ""])
def test_a_library_that_does_not_load_is_an_error_that_names_it(environment: Environment, content: str) -> None:
    library = environment.tree / "ctm_fast/lib/libctm_fast_ops.so"
    library.parent.mkdir()
    library.write_text(content)
    result = environment.run("-c", "import ctm_fast")
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: ctm_fast: {library} does not load into torch {torch.__version__}")
    assert environment.run("-m", "ctm_fast.report").returncode == 1


def test_closed_libraries_serve_nothing(environment: Environment) -> None:
    code = "from ctm_fast import _libraries; print(_libraries.missing('cpu'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"CTM_FAST_LIBRARIES": "0"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "CTM_FAST_LIBRARIES=0 leaves the libraries closed\n", result


@pytest.fixture(params=list(_libraries.FILES.values()))
def library(request: pytest.FixtureRequest) -> Path:
    path = _libraries.DIRECTORY / str(request.param)
    if not path.exists():
        pytest.skip(f"{path.name} is not built here: {_libraries.build_note().get('missing')}")
    return path


def undefined_symbols(library: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm to read a library's symbols with")
    result = subprocess.run(["nm", "-D", "-u", "-C", str(library)], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=1)[1] for line in result.stdout.splitlines()]


def test_a_library_has_no_python_in_it_and_nothing_of_torch_but_its_stable_interface(library: Path) -> None:
    symbols = undefined_symbols(library)
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    strangers = [symbol for symbol in symbols if re.match(r"_?Py|(.* )?(at|c10|torch)::", symbol)]
    assert strangers == []


@pytest.mark.long
def test_a_program_without_python_links_the_library_and_runs_an_op(tmp_path: Path) -> None:
    library = _libraries.DIRECTORY / "libctm_fast_ops.so"
    if not library.exists():
        pytest.skip(f"{library.name} is not built here: {_libraries.build_note().get('missing')}")
    command = ["c++", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{TORCH / 'include'}"]
    command += [str(ROOT / "tests" / "program.cpp"), "-o", str(tmp_path / "program"), "-Wl,--no-as-needed"]
    command += [str(library), f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{TORCH / 'lib'}"]
    subprocess.run([*command, f"-Wl,-rpath-link,{TORCH / 'lib'}", f"-Wl,-rpath,{library.parent}"], check=True)
    result = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True)
    assert result.stdout == f"{1.5 + 2**0.5:.6f}\n", result


def test_build_info_tells_how_the_module_was_built() -> None:
    if importlib.util.find_spec("ctm_fast._C") is None:
        pytest.skip(f"ctm_fast._C is not built here: {_libraries.build_note().get('missing')}")
    from ctm_fast import _C

    info = _C.build_info()
    assert set(info) == {"compiler", "flags", "torch", "cuda", "architectures"}
    note = _libraries.build_note()
    assert info["torch"] == note["torch"]
    assert info["architectures"] == note["architectures"]
    assert (info["cuda"] is None) == (note["architectures"] == [])
    assert "-O3" in info["flags"]


@pytest.mark.long
@pytest.mark.parametrize(
    "install", [["install", "--no-deps", "."], ["install", "--no-deps", "--no-build-isolation", "-e", "."]]
)
def test_pip_installs_from_a_copy_into_another_environment(tmp_path: Path, install: list[str]) -> None:
    """Isolated and not: built against this torch, named by CTM_FAST_TORCH, and the same kernels serve."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".git", "build", "lib", "*.so", "__pycache__", ".venv", "runs")
    shutil.copytree(ROOT, tree, ignore=ignore)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(f"{TORCH.parent}\n")
    result = subprocess.run(
        [str(venv / "bin" / "python"), "-m", "pip", *install],
        cwd=tree,
        env=plain_environment() | {"CTM_FAST_TORCH": str(TORCH), "CTM_FAST_BUILD": "required"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result
    code = (
        "import ctm_fast; from ctm_fast import _C, ops; print(ctm_fast.__file__, ops.serving('precond_combine', 'cpu'))"
    )
    imported = subprocess.run(
        [str(venv / "bin" / "python"), "-c", code],
        cwd=tmp_path,
        env=plain_environment(),
        capture_output=True,
        text=True,
    )
    home = tree if "-e" in install else site
    assert imported.stdout == f"{home / 'ctm_fast' / '__init__.py'} cpp\n", imported
