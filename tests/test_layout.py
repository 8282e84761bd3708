"""The rules of CONTRIBUTING.md, "Where does a line belong?", checked from the source, folder by folder."""

import ast
import functools
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import fastbert
from fastbert.proof.op_cases import OPS

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "fastbert").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
OTHERS = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

# wing (a folder, or a file at the top of fastbert/) -> the wings that it may import, and the libraries of others beside
# Python's own; None: no rule
MAY_IMPORT = {
    "kernels": ("", "torch triton"),
    "reference": ("reference_heads", "torch"),
    "reference_heads": ("", "torch"),
    "cpu": ("reference", "torch numpy"),
    "ops": ("kernels cpu reference values", "torch"),
    "values": ("", "torch"),
    "packing": ("", "torch numpy"),
    "files": ("", None),
    "hub": ("files", None),
    "data": ("packing files hub", None),
    "model": ("ops reference packing files hub data", None),
    "swapping": ("ops packing", None),
    "tasks": ("ops packing files hub data model swapping", None),
    "retrieval": ("files hub data model tasks", None),
    "training": ("ops packing files hub data model swapping tasks", None),
}
# the two longest kernels have more room
LONG = {ROOT / "kernels" / "attention.py": 700, ROOT / "kernels" / "disentangled_attention.py": 700}


def name_of(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    """fastbert.x.y of a file of the library or of the kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastbert", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing_of(module):
    """The folder or top file that fastbert.x.y belongs to: x. "" for what is in `fastbert` itself."""
    return (module.split(".") + [""])[1]


MODULES = {module_of(path): path for path in LIBRARY + KERNELS}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path):
    """Every module that a file imports when it runs, at its top or inside a function, by its full name."""
    found = []
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    whole = tree(path)
    for node in ast.walk(whole):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            # for type checkers alone
            node.body = []
    for node in ast.walk(whole):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append(full if full in MODULES or full == "fastbert.kernels" else base)
    return found


def ours(path):
    """The modules of the library that a file imports."""
    return {module for module in imports(path) if module.split(".")[0] == "fastbert"}


def run(code, *, path=(), cwd=ROOT):
    """Run Python code in a fresh process; its last line of output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def ops_with_kernels():
    """The functions of ops.py that choose an implementation."""
    for node in tree(ROOT / "fastbert" / "ops.py").body:
        if isinstance(node, ast.FunctionDef):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "_run":
                    assert call.args[0].value == node.name
                    yield node.name


def functions(path):
    return {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}


def signature(path, name):
    """The arguments of a function with their defaults, as text, without `impl` and types."""
    arguments = functions(path)[name].args
    keep = [i for i, argument in enumerate(arguments.kwonlyargs) if argument.arg != "impl"]
    arguments.kwonlyargs = [arguments.kwonlyargs[i] for i in keep]
    arguments.kw_defaults = [arguments.kw_defaults[i] for i in keep]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


@pytest.mark.parametrize("path", LIBRARY + KERNELS, ids=name_of)
def test_a_wing_imports_what_it_may(path):
    wing = wing_of(module_of(path))
    if wing not in MAY_IMPORT:
        return
    wings, libraries = MAY_IMPORT[wing]
    for module in imports(path):
        root = module.split(".")[0]
        if root == "fastbert":
            allowed = wing_of(module) in {wing, "", *wings.split()}
        else:
            allowed = libraries is None or root in {*libraries.split(), *sys.stdlib_module_names}
        assert allowed, f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_triton_stays_in_the_kernels_and_in_their_proof(path):
    wing = wing_of(module_of(path))
    if wing != "proof":
        for module in imports(path):
            assert module.split(".")[0] != "triton", f"{name_of(path)} imports {module}: that belongs in kernels/"
            is_kernel = wing_of(module) == "kernels" and module.startswith("fastbert.")
            assert wing == "ops" or not is_kernel, f"{name_of(path)} imports {module}: only ops.py may"
    names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    assert "tl" not in names, f"{name_of(path)} says tl.: that belongs in kernels/"


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_transformers_is_known_in_swapping_only(path):
    wing = wing_of(module_of(path))
    if wing != "swapping":
        assert not [module for module in imports(path) if module.split(".")[0] == "transformers"]
    if wing not in ("swapping", "model"):
        texts = {x.value for x in ast.walk(tree(path)) if isinstance(x, ast.Constant) and isinstance(x.value, str)}
        assert not [text for text in texts if text.startswith(("bert.", "cls."))]


@pytest.mark.parametrize("path", sorted((ROOT / "fastbert" / "model").glob("*.py")), ids=name_of)
def test_a_model_knows_no_device_and_no_file(path):
    nodes = list(ast.walk(tree(path)))
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda")]
    if path.name != "hf_files.py":
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not texts & {"cuda", "cpu"}
        assert not {"io", "json", "pickle", "safetensors", "shutil", "zipfile"} & {
            x.split(".")[0] for x in imports(path)
        }
        called = {getattr(x.func, "attr", getattr(x.func, "id", "")) for x in nodes if isinstance(x, ast.Call)}
        assert not called & {"open", "read_text", "write_text", "read_bytes", "write_bytes"}


def test_autocast_is_handled_in_ops_only():
    # a training script may switch autocast on; only ops.py may look at it
    for path in LIBRARY + KERNELS:
        names = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        looks = names & {"is_autocast_enabled", "get_autocast_dtype"}
        assert not looks or path == ROOT / "fastbert" / "ops.py", name_of(path)


def test_no_two_files_import_each_other():
    # whoever imports x.y runs x/__init__.py too, which imports nothing
    open_ends = {module: ours(path) & set(MODULES) for module, path in MODULES.items()}
    while leaves := {module for module, needed in open_ends.items() if not needed & set(open_ends)}:
        open_ends = {module: needed for module, needed in open_ends.items() if module not in leaves}
    assert not open_ends


@pytest.mark.parametrize("path", LIBRARY + KERNELS + OTHERS, ids=name_of)
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONG.get(path, 500)


def test_a_wing_says_in_a_sentence_what_it_is():
    for path in (ROOT / "fastbert").glob("*/__init__.py"):
        (docstring,) = tree(path).body
        assert docstring.value.value.endswith("."), name_of(path)


def test_no_file_hides_a_public_name():
    # importing fastbert.swap would put that module where the function is
    places = {path.stem for path in (ROOT / "fastbert").iterdir()}
    assert places & set(fastbert.__all__) == {"ops"}


@pytest.mark.parametrize("folder", ["kernels", "tests", "benchmarks"])
def test_folder_is_no_package(folder):
    # a regular package `kernels` would hide the one that HuggingFace publishes
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_tests_mirror_the_wings():
    tests = list((ROOT / "tests").rglob("test_*.py"))
    assert {count for _, count in Counter(path.name for path in tests).items()} == {1}
    wings = {path.parent.name for path in LIBRARY if path.parent != ROOT / "fastbert"}
    for path in tests:
        folder = str(path.parent.relative_to(ROOT / "tests"))
        assert folder in {".", "kernels", "benchmarks", *wings}, name_of(path)


@pytest.mark.parametrize("name", ["tests", "setup", "fastbert", "benchmarks"])
def test_package_maps_the_kernels_alone(name, tmp_path):
    """Of what lies beside the package in a checkout; with the checkout on the path, and in it."""
    code = f"import importlib.util, fastbert.kernels; print(importlib.util.find_spec('fastbert.{name}'))"
    assert run(code, path=[ROOT], cwd=tmp_path) == run(code) == "None"


def test_no_drawer_for_everything():
    assert not [path for path in LIBRARY + KERNELS + OTHERS if path.stem in {"utils", "util", "common", "misc"}]


@pytest.mark.parametrize("op", sorted(ops_with_kernels()))
def test_op_has_one_signature(op):
    """In ops.py, reference.py, its one kernel file and, unless it is the reference's own there, in one file of cpu/."""
    public = signature(ROOT / "fastbert" / "ops.py", op)
    meanings = (ROOT / "fastbert" / "reference.py", ROOT / "fastbert" / "reference_heads.py")
    (meaning,) = (path for path in meanings if op in functions(path))
    assert signature(meaning, op) == public
    (kernel,) = (path for path in KERNELS if op in functions(path))
    assert signature(kernel, op) == public
    for path in (ROOT / "fastbert" / "cpu").glob("*.py"):
        assert op not in functions(path) or signature(path, op) == public


def test_every_op_is_checked_above():
    assert set(ops_with_kernels()) == set(OPS)


def test_import_takes_under_half_a_second():
    def seconds():
        start = time.perf_counter()
        run("import fastbert")
        return time.perf_counter() - start

    # the best of five: the other tests keep the machine busy
    assert min(seconds() for _ in range(5)) < 0.5


def test_works_without_triton_and_without_transformers():
    modules = [module for module, path in MODULES.items() if path in LIBRARY and not path.name.startswith("_")]
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{
            "triton", "transformers", "huggingface_hub", "peft", "pyarrow", "matplotlib", "tensorboard", "yaml"
        }}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib, torch, fastbert
for module in {modules}:
    importlib.import_module(module)
from fastbert import ops
y = ops.layer_norm(torch.ones(3, 5), torch.ones(5), torch.zeros(5), impl="auto")
assert y.abs().max() < 1e-3 and "triton" not in sys.modules and "transformers" not in sys.modules
print("works")
"""
    assert len(modules) > 30 and run(code) == "works"


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
