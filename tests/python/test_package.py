"""The package as a user gets it: a wheel in an environment of its own, with numpy alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build_options() -> list[str]:
    """What `make setup` built, where it is of this interpreter and without CUDA, so that nothing is compiled
    again; else a folder that is kept, so that only the first time compiles."""
    made = ROOT / "build" / "module"
    cache = made / "CMakeCache.txt"
    if cache.exists() and not (made / "CMakeFiles" / "kv4_cuda.dir").exists():
        (python,) = re.findall(r"^Python_EXECUTABLE:\w+=(.+)$", cache.read_text(encoding="utf-8"), re.MULTILINE)
        if python == sys.executable:
            return ["-C", f"build-dir={made}"]
    tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    return ["-C", f"build-dir={ROOT}/build/wheel-{tag}", "-C", "cmake.define.KV4_CUDA=OFF"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps",
            *build_options(), "--wheel-dir", folder, ROOT,
        ],
        check=True,
    )  # fmt: skip
    (found,) = folder.glob("kv4-*.whl")
    return found


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and numpy, this one's."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site, wheel],
        check=True,
    )
    import numpy

    for source in Path(numpy.__file__).parents[1].glob("numpy*"):
        (site / source.name).symlink_to(source)
    return python


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Away from the checkout, with nothing of this environment's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, cwd=python.parent, env=environment, check=False
    )


def test_ten_lines_run_with_numpy_alone(bare: Path):
    done = run(bare, ROOT / "tests" / "package" / "ten_lines.py")
    assert done.returncode == 0, done.stderr
    assert "bytes for 300 tokens" in done.stdout
    assert "torch" not in run(bare, "-c", "import kv4, sys; kv4.Recipe(); print(*sys.modules)").stdout.split()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import kv4.hf",
            "kv4.hf: expected torch and transformers, which pip install 'kv4[hf]' brings; got no module torch",
        ),
        ("import kv4.mlx", "kv4.mlx: expected mlx and mlx_lm, which pip install 'kv4[mlx]' brings; got no module mlx"),
        ("import kv4.evaluate", "kv4.evaluate: expected torch and transformers and matplotlib, which pip install"),
        ("import kv4.calibration", "kv4.calibration: expected torch and safetensors, which pip install 'kv4[hf]'"),
    ],
)
def test_what_needs_more_names_the_extra(bare: Path, code: str, says: str):
    done = run(bare, "-c", code)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: {says}"), done.stderr


def test_the_command_names_its_extra_in_one_line(bare: Path):
    done = run(bare, "-c", "import sys; sys.argv = ['kv4', 'info']; from kv4.cli import main; main()")
    assert done.returncode == 1
    assert done.stderr == "kv4: expected typer and rich, which pip install 'kv4[tools]' brings; got no module typer\n"


def test_the_wheel_asks_for_numpy_alone(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        wanted = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    assert [each for each in wanted if "extra ==" not in each] == ["numpy>=1.26"]
    assert {name.split("/")[0] for name in names} == {"kv4", metadata.split("/")[0]}
    assert [name for name in names if name.endswith("_core.so") or "_core." in name and name.endswith(".so")]
    assert not [name for name in names if name.endswith((".cpp", ".pyc"))]


def test_the_module_exports_nothing_of_the_library(wheel: Path, tmp_path: Path):
    """Two modules of one process that hold the library would otherwise call each other's."""
    nm = shutil.which("nm")
    if nm is None or sys.platform == "darwin":
        pytest.skip("no nm that lists dynamic symbols")
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if "_core." in name and name.endswith(".so"))
        archive.extract(module, tmp_path)
    listed = subprocess.run(
        [nm, "-D", "-C", "--defined-only", tmp_path / module], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split(maxsplit=2)[2] for line in listed.splitlines()]
    assert "PyInit__core" in names
    assert [name for name in names if "kv4" in name] == []


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_the_wheel_suits_other_linux_systems(wheel: Path, tmp_path: Path):
    """With the command that the wheels' workflow repairs with: a manylinux tag, and no copy of a library inside."""
    pytest.importorskip("auditwheel")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (command,) = re.findall(r'"(auditwheel repair [^"]+)"', project)
    words = [word.format(dest_dir=tmp_path, wheel=wheel) for word in command.split()]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (repaired,) = tmp_path.glob("*.whl")
    assert "manylinux_" in repaired.name, repaired.name
    with zipfile.ZipFile(repaired) as archive:
        assert not [name for name in archive.namelist() if ".libs/" in name]


def test_the_stable_abi_is_all_that_the_wheel_uses(wheel: Path):
    pytest.importorskip("abi3audit")
    if "-abi3-" not in wheel.name:
        pytest.skip("this interpreter's wheel is for it alone: CPython 3.12 has the first with the stable ABI")
    done = subprocess.run(
        [sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "0 ABI violations found" in " ".join(done.stderr.split()), done.stderr


def test_the_oldest_versions_are_those_that_the_package_takes():
    """`make test-oldest` has the lower bounds of pyproject.toml, each of them."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = dict(
        re.findall(r"^([\w-]+)==([\d.]+?)(?:\.\*)?$", (ROOT / "requirements-oldest.txt").read_text(), re.MULTILINE)
    )
    wanted = {}
    for part in ("requires", "dependencies", "hf", "tools", "test"):
        (listed,) = re.findall(rf"^{part} = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
        wanted |= dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    del wanted["safetensors"]  # the oldest transformers asks for a later one
    assert {name: pinned.get(name, "").removesuffix(".0") for name in wanted} == {
        name: version.removesuffix(".0") for name, version in wanted.items()
    }


def test_one_version():
    """Of the library, of what a citation names and of what CHANGELOG says is released or to come."""
    header, citation, changes = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("include/kv4/version.h", "CITATION.cff", "CHANGELOG.md")
    )
    (released,) = re.findall(r'^#define KV4_VERSION "(.+)"$', header, re.MULTILINE)
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [released]
    assert re.search(rf"^(## |First release, ){re.escape(released)}\b", changes, re.MULTILINE)


@pytest.mark.parametrize(("platform", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("macos", "arm64")])
def test_cibuildwheel_takes_the_configuration(platform: str, machine: str):
    """The release of cibuildwheel that the workflow runs knows every option, and builds one wheel for each Python
    before 3.12 and one for those from it on."""
    program = shutil.which("cibuildwheel", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("no cibuildwheel, which needs Python 3.11")
    done = subprocess.run(
        [program, "--platform", platform, "--archs", machine, "--print-build-identifiers", ROOT],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    system = {"linux": "manylinux", "macos": "macosx"}[platform]
    assert done.stdout.split() == [f"cp3{minor}-{system}_{machine}" for minor in (10, 11, 12)]
    (released,) = re.findall(r"pypa/cibuildwheel@v([\d.]+)", (ROOT / ".github/workflows/wheels.yml").read_text())
    assert released == version("cibuildwheel")


def test_a_module_that_is_there_but_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from kv4.extras import require

    (tmp_path / "broken_module.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        require("part", "extra", "broken_module")
