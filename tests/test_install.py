"""The package as a user gets it: the wheel, an editable install, and the bare folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastbert

ROOT = Path(__file__).resolve().parent.parent
PIP = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation"]

# runs the installed kernel in Triton's interpreter, so that an empty or stale file cannot pass; of what lies around the
# package in a checkout, only kernels/ can be imported through it
CHECK = """
import importlib.util, torch, fastbert
assert not [name for name in ("setup", "tests", "fastbert") if importlib.util.find_spec(f"fastbert.{name}")]
from fastbert import ops
from fastbert.kernels import _launch, layer_norm
assert _launch.measured() == {"toy_fwd": {}}
x = torch.randn(3, 37)
args = x, torch.ones(37), torch.zeros(37)
torch.testing.assert_close(ops.layer_norm(*args, impl="triton"), ops.layer_norm(*args, impl="reference"))
print(fastbert.__version__, fastbert.__file__, layer_norm.__file__, sep="\\n")
"""


def call(*command, cwd, **environment):
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "FASTBERT_IMPL"}
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the package is built from: building writes into the folder it builds from."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastbert", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    # settings as they are shipped for a GPU, for the interpreter to find
    (copy / "kernels" / "profiles" / "interpreter.json").write_text('{"settings": {"toy_fwd": {}}}')
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, *PIP, "wheel", source, *OFFLINE, "-w", out, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture
def venv(tmp_path):
    """An empty environment, except that it sees the dependencies of the one that runs the tests."""
    python = tmp_path / "venv" / "bin" / "python"
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # a .pth line adds the folder, not the .pth files inside it: an editable fastbert there stays unseen
    folders = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (Path(site) / "dependencies.pth").write_text("\n".join(folders) + "\n")
    return python


def test_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"fastbert_kernels-{fastbert.__version__}.dist-info/METADATA").decode()
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastbert").rglob("*.py")}
    kernels = {f"fastbert/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    shipped = [*(ROOT / "kernels" / "profiles").glob("*.json"), Path("interpreter.json")]
    profiles = {f"fastbert/kernels/profiles/{path.name}" for path in shipped}
    assert names == library | kernels | profiles | {"fastbert/py.typed"}
    assert "fastbert/kernels/__init__.py" not in names
    assert "Name: fastbert-kernels\n" in metadata
    assert "Requires-Dist: torch>=2.10\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata


def test_wheel_works_elsewhere(wheel, venv, tmp_path):
    call(sys.executable, *PIP, f"--python={venv}", "install", *OFFLINE, wheel, cwd=tmp_path)
    version, package, kernel = call(venv, "-c", CHECK, cwd=tmp_path, TRITON_INTERPRET="1").split()
    assert version == fastbert.__version__
    assert Path(package).is_relative_to(venv.parent.parent)
    assert Path(kernel) == Path(package).parent / "kernels" / "layer_norm.py"
    help_page = call(venv.parent / "fastbert", "--help", cwd=tmp_path)
    assert "fill-mask" in help_page
    assert call(venv, "-m", "fastbert", "--help", cwd=tmp_path) == help_page


def test_editable_install_works_elsewhere(source, venv, tmp_path):
    call(sys.executable, *PIP, f"--python={venv}", "install", *OFFLINE, "--editable", source, cwd=tmp_path)
    _, package, kernel = call(venv, "-c", CHECK, cwd=tmp_path, TRITON_INTERPRET="1").split()
    assert Path(package) == source / "fastbert" / "__init__.py"
    assert Path(kernel) == source / "kernels" / "layer_norm.py"


def test_bare_folder_works(source, venv):
    _, package, kernel = call(venv, "-c", CHECK, cwd=source, TRITON_INTERPRET="1").split()
    assert Path(package) == source / "fastbert" / "__init__.py"
    assert Path(kernel) == source / "kernels" / "layer_norm.py"
