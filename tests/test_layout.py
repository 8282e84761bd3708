"""The rules of CONTRIBUTING.md, "Where does a line belong?", checked from the source."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "fastbert").rglob("*.py"))
CPU = sorted((ROOT / "fastbert" / "cpu").glob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
# these look at kernels and at Triton, and run no op
COMPILING = {"kernel_cases.py", "offline.py", "machine_code.py", "doctor.py"}
# those that may know HuggingFace's classes and key names
HUGGINGFACE = {"variants.py", "swapping.py", "replacements.py", "huggingface_replacements.py", "huggingface.py"}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Every module that a file imports, at its top or inside a function; relative ones keep their dots."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}".replace("..", ".") for alias in node.names)


def absolute_imports(path):
    """Those of a file of the library, relative ones spelled out: fastbert.ops."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def is_kernels(module):
    return module.startswith("fastbert.kernels") or module == "kernels"


def run(code, *, path=(), cwd=ROOT):
    """Run Python code in a fresh process; its last line of output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def signatures():
    """(op, kernel file) of every function in ops.py that chooses an implementation."""
    for node in tree(ROOT / "fastbert" / "ops.py").body:
        if isinstance(node, ast.FunctionDef):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "_choose":
                    yield node.name, call.args[0].value, call.args[1].value


def signature(path, name):
    """The arguments of a function with their defaults, as text, without `impl` and types."""
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            arguments = node.args
            keep = [i for i, argument in enumerate(arguments.kwonlyargs) if argument.arg != "impl"]
            arguments.kwonlyargs = [arguments.kwonlyargs[i] for i in keep]
            arguments.kw_defaults = [arguments.kw_defaults[i] for i in keep]
            for argument in ast.walk(arguments):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            return ast.unparse(arguments)
    raise AssertionError(f"{path.name} has no function {name}")


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_triton_and_themselves(path):
    for module in imports(path):
        root = module.split(".")[0]
        assert module.startswith(".") or root in {"torch", "triton"} | sys.stdlib_module_names, module
        assert not module.startswith(".."), f"{path.name} reaches outside kernels/: {module}"


def test_reference_imports_torch_alone():
    assert {module.split(".")[0] for module in imports(ROOT / "fastbert" / "reference.py")} == {"torch"}


@pytest.mark.parametrize("path", CPU, ids=lambda path: path.name)
def test_cpu_imports_torch_numpy_and_the_reference(path):
    for module in imports(path):
        root = module.split(".")[0]
        theirs = root in {"torch", "numpy"} | sys.stdlib_module_names
        assert theirs or module.startswith(("..reference", ".reference")) or is_own(module), module


def is_own(module):
    """Whether a relative import stays in cpu/: `.file`, or what a file there has."""
    return module == ".." or (module.startswith(".") and module.split(".")[1] in {path.stem for path in CPU})


def is_cpu(module):
    return module.startswith((".cpu", "fastbert.cpu"))


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_leaves_kernels_to_ops_and_triton_to_kernels(path):
    for module in absolute_imports(path):
        if path.name in COMPILING:
            continue
        assert module.split(".")[0] != "triton", f"{path.name} imports {module}: that belongs in kernels/"
        is_chosen = is_kernels(module) or is_cpu(module)
        assert path.name == "ops.py" or not is_chosen, f"{path.name} imports {module}: only ops.py may"
    names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    assert "tl" not in names, f"{path.name} says tl.: that belongs in kernels/"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_huggingface_names_stand_in_the_tables_only(path):
    if path.name in HUGGINGFACE:
        return
    for module in absolute_imports(path):
        assert module.split(".")[0] != "transformers", f"{path.name} imports {module}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("bert.", "cls.")), f"{path.name}:{node.lineno} names {node.value!r}"


@pytest.mark.parametrize("path", sorted((ROOT / "fastbert" / "training").glob("*.py")), ids=name_of)
def test_training_needs_nothing_that_proves_kernels(path):
    found = {module.split(".")[-1] for module in absolute_imports(path) if module.startswith("fastbert.")}
    assert not found & {Path(name).stem for name in COMPILING} and "fastbert.proof" not in found


def test_autocast_is_handled_in_ops_only():
    # a training script may switch autocast on; only ops.py may look at it
    for path in LIBRARY + CPU + KERNELS:
        names = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        assert path.name == "ops.py" or not names & {"is_autocast_enabled", "get_autocast_dtype"}, path.name


@pytest.mark.parametrize("folder", ["kernels", "tests", "benchmarks"])
def test_folder_is_no_package(folder):
    # a regular package `kernels` would hide the one that HuggingFace publishes
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("name", ["tests", "setup", "fastbert", "benchmarks"])
def test_package_maps_the_kernels_alone(name, tmp_path):
    """Of what lies beside the package in a checkout; with the checkout on the path, and in it."""
    code = f"import importlib.util, fastbert.kernels; print(importlib.util.find_spec('fastbert.{name}'))"
    assert run(code, path=[ROOT], cwd=tmp_path) == run(code) == "None"


def test_no_drawer_for_everything():
    folders = ("fastbert", "kernels", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100 and not [path for path in files if path.stem in {"utils", "util", "common", "misc"}]


def test_names_of_test_files_are_unique():
    # the folders of tests are no packages, so pytest knows a file by its name alone
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("op", "file", "name"), list(signatures()), ids=lambda value: value)
def test_op_has_one_signature(op, file, name):
    assert op == name
    public = signature(ROOT / "fastbert" / "ops.py", op)
    assert signature(ROOT / "fastbert" / "reference.py", op) == public
    assert signature(ROOT / "kernels" / f"{file}.py", op) == public
    # where `cpu/ops.py` finds it: the reference's own has been compared
    for node in tree(ROOT / "fastbert" / "cpu" / "ops.py").body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and op in {alias.name for alias in node.names}:
            assert signature(ROOT / "fastbert" / "cpu" / f"{node.module}.py", op) == public


def test_every_op_is_checked_above():
    assert {op for op, _, _ in signatures()} >= {
        "attention", "layer_norm", "bias_gelu", "gelu_layer_norm", "embedding", "masked_cross_entropy",
    }  # fmt: skip


def test_import_takes_under_half_a_second():
    def seconds():
        start = time.perf_counter()
        run("import fastbert")
        return time.perf_counter() - start

    # the best of five: the other tests keep the machine busy
    assert min(seconds() for _ in range(5)) < 0.5


def test_works_without_triton_and_without_transformers():
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "transformers", "pyarrow", "matplotlib", "tensorboard", "yaml"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib, pathlib, torch, fastbert
root = pathlib.Path(fastbert.__file__).parent
for path in root.rglob("[!_]*.py"):
    importlib.import_module(".".join(("fastbert", *path.relative_to(root).with_suffix("").parts)))
from fastbert import ops
y = ops.layer_norm(torch.ones(3, 5), torch.ones(5), torch.zeros(5), impl="auto")
assert y.abs().max() < 1e-3 and "triton" not in sys.modules and "transformers" not in sys.modules
print("works")
"""
    assert run(code) == "works"


def test_huggingface_kernels_package_is_found_beside_ours(tmp_path):
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("OWNER = 'HuggingFace'\n")
    code = "import kernels, fastbert.kernels.layer_norm as ours; print(kernels.OWNER, ours.__file__)"
    # their package comes last on the path, where site-packages stands
    assert run(code, path=[ROOT, tmp_path]) == f"HuggingFace {ROOT / 'kernels' / 'layer_norm.py'}"


def test_transformers_loads_beside_our_kernels():
    pytest.importorskip("transformers")
    code = "import fastbert.kernels.layer_norm; from transformers import BertModel; print(BertModel.__name__)"
    assert run(code) == "BertModel"


def test_ci_runs_the_test_command_of_the_readme():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(line.split("#")[0].strip() == commands[0] for line in readme)
