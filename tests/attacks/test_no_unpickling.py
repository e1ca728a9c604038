"""That there is one closed unpickler and nothing beside it: read off the code itself, and tried without the packages
whose objects checkpoints hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.goldens import SHARED, golden, megatron_cases

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("registry", "formats", "mappings") for path in (ROOT / folder).rglob("*.py"))

#: Calls that unpickle, build objects of a file's choosing, or run text: by the last parts of their dotted names.
FORBIDDEN = (
    "pickle.load", "pickle.loads", "pickle._load", "pickle._loads", "pickle._Unpickler", "torch.load", "np.load",
    "numpy.load", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "cloudpickle.loads", "dill.loads",
    "eval", "exec", "compile", "__import__", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "np.fromregex",
    "os.system", "os.popen", "subprocess.run", "subprocess.Popen", "pandas.read_pickle", "torch.jit.load",
    "torch.package.PackageImporter", "importlib.import_module", "pickletools.optimize", "tarfile.open",
    "shutil.unpack_archive",
)  # fmt: skip
#: Where one of those is right: (file, call) -> why.
ALLOWED: dict[tuple[str, str], str] = {}


def calls(path: Path) -> list[tuple[str, int]]:
    """Dotted names that a file calls, and base classes and names that it takes from modules that unpickle."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), node.lineno))
        elif isinstance(node, ast.ImportFrom) and node.module in ("pickle", "_pickle", "marshal", "shelve", "torch"):
            found += [(f"{node.module}.{name.name}", node.lineno) for name in node.names]
        elif isinstance(node, ast.ClassDef):
            found += [(ast.unparse(base), node.lineno) for base in node.bases]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_unpickles_or_runs_text(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for call, line in calls(path):
        bad = any(call == one or call.endswith(f".{one}") for one in FORBIDDEN if "." in one) or call in FORBIDDEN
        assert not bad or (name, call) in ALLOWED, f"{name}:{line} calls {call}"
        if call.endswith("pickle.Unpickler"):
            assert name == "formats/pickles.py", f"{name}:{line} has an unpickler of its own"
        if call == "yaml.load":
            assert name == "registry/catalog.py", f"{name}:{line} reads YAML by itself"


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    """The test above can fail: each forbidden call is found where there is one."""
    for one in FORBIDDEN:
        path = tmp_path / "code.py"
        path.write_text(f"def f(x):\n    return {one}(x)\n")
        assert (one, 2) in calls(path)


def test_the_yaml_reader_is_a_safe_one() -> None:
    """`yaml.load` is called once, with a loader made of SafeLoader."""
    source = (ROOT / "registry" / "catalog.py").read_text()
    assert source.count("yaml.load(") == 1
    assert 'base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)' in source and "class Loader(base)" in source


#: Opens whatever it is given, in a process that has none of the packages that the pickles' objects are of.
SCRIPT = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine", "torch", "transformers", "apex", "nemo"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
import registry
from registry import catalog
from registry.source import detect_format
from registry.storage import Rank

for line in sys.stdin.read().splitlines():
    path = Path(line)
    spec = detect_format(path)
    opened = catalog.container(spec.container).open(path, spec.name)
    assert opened.pieces, path
    if opened.training is not None:
        assert opened.training(None) is not None
        opened.training(Rank())
    if opened.module_states is not None:
        opened.module_states()
    print(spec.name, len(opened.pieces))
loaded = [name for name in sys.modules if name.split(".")[0] in ("megatron", "transformer_engine", "torch")]
assert not loaded, loaded
"""


def test_goldens_are_read_without_the_programs_that_wrote_them() -> None:
    """All that megatron-core 0.8 to current, Megatron-Bridge and torch wrote, with none of these packages at hand."""
    paths = [case.path for case in megatron_cases()]
    if (SHARED / "bridge").exists():
        paths += sorted(path.parent for path in (SHARED / "bridge").rglob(".metadata"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input="\n".join(map(str, paths)), capture_output=True, text=True, timeout=280,
        cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(paths) >= 20


def test_a_golden_is_no_plain_pickle_without_its_program() -> None:
    """What the test above reads does hold objects of Megatron's: the real unpickler cannot do without them."""
    names = set()
    for path in [
        *golden("megatron/llama/tp1pp1").rglob("common.pt"),
        *golden("megatron/llama").rglob("model_optim_rng.pt"),
    ]:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        names |= {word for word in (b"megatron", b"argparse", b"torch") if word in data}
    assert {b"megatron", b"argparse", b"torch"} <= names
