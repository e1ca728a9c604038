"""The wheel, installed away from the repository: complete, typed, and not to be shadowed by a user's own files."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A directory in the repository, and what it is called when it is installed.
PACKAGES = {"registry": "registry", "formats": "registry_formats", "mappings": "registry_mappings"}

# A user's script, beside a formats.py and a mappings/ of their own.
SCRIPT = """
import json, sys
import registry

model, out = sys.argv[1:]
report = registry.convert(model, f"{out}/megatron", to="megatron", parallel=registry.Parallel(tp=2, pp=2))
registry.convert(f"{out}/megatron", f"{out}/back", to="huggingface")
shadowing = [name for name in ("formats", "mappings") if name in sys.modules]
homes = [module.__file__ for name, module in sys.modules.items() if name.startswith("registry_formats.")]
import formats, mappings
print(json.dumps({
    "file": registry.__file__,
    "version": registry.__version__,
    "formats": registry.formats(),
    "architectures": registry.architectures(),
    "homes": homes,
    "verified": bool(registry.verify(f"{out}/megatron", model)),
    "shadowing": shadowing,
    "own": [formats.OWN, mappings.OWN],
}))
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the repository on any path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def sources() -> dict[str, Path]:
    """Every file that the wheel should hold, by its name there."""
    return {
        str(package / path.relative_to(ROOT / folder)): path
        for folder, package in ((name, Path(installed)) for name, installed in PACKAGES.items())
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".yaml", ".typed")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        copytree(ROOT / name, tree / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    build = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation")
    run(*build, "-w", tree / "dist", tree, cwd=tree)
    (built,) = (tree / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds the wheel, with what it depends on borrowed from this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=home)
    (library,) = home.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last, and .pth files found there (our editable install's) are not read.
    (library / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A user's working directory, with modules and specs that have the names of ours."""
    folder = tmp_path / "work"
    for name in ("mappings/architectures", "mappings/formats"):
        (folder / name).mkdir(parents=True)
        for spec in ("llama", "huggingface", "megatron"):
            (folder / name / f"{spec}.yaml").write_text("not: ours\n")
    (folder / "formats.py").write_text("OWN = 'formats'\n")
    (folder / "mappings" / "__init__.py").write_text("OWN = 'mappings'\n")
    (folder / "script.py").write_text(SCRIPT)
    return folder


def test_the_wheel_holds_every_module_and_spec_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        for name, path in sources().items():
            assert archive.read(name) == path.read_bytes(), name
    assert names == set(sources())
    assert "registry/py.typed" in names
    assert {"registry_mappings/architectures/llama.yaml", "registry_mappings/formats/megatron.yaml"} <= names
    assert "\nRequires-Python: >=3.11\n" in metadata


def test_it_works_beside_a_users_own_formats_and_mappings(installed, hostile, hf_model, tmp_path):
    model, out = hf_model("llama3"), tmp_path / "out"
    out.mkdir()
    found = json.loads(run(installed, "script.py", model, out, cwd=hostile).stdout)
    home = installed.parent.parent
    assert Path(found["file"]).is_relative_to(home)
    assert found["homes"] and all(Path(path).is_relative_to(home) for path in found["homes"])
    assert found["formats"] == specs("formats") and found["architectures"] == specs("architectures")
    assert found["verified"]
    assert found["shadowing"] == [] and found["own"] == ["formats", "mappings"]
    for path in model.iterdir():
        assert (out / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def specs(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "mappings" / folder).glob("*.yaml"))


@pytest.mark.parametrize("kind", ["formats", "architectures"])
def test_the_command_works_beside_a_users_own_formats_and_mappings(kind, installed, hostile):
    output = run(installed.parent / "registry", kind, cwd=hostile, PYTHONPATH=str(hostile)).stdout
    for name in specs(kind):
        assert name in output


def test_it_is_typed(installed, tmp_path):
    """A user's mypy takes our annotations; what torch and others declare is not looked at, which takes a minute."""
    pytest.importorskip("mypy")
    skip = "[mypy-torch.*,numpy.*,pydantic.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\n" + skip)
    (tmp_path / "script.py").write_text(
        "import registry\n"
        "report = registry.convert('a', 'b', to='megatron', parallel=registry.Parallel(tp=2))\n"
        "reveal_type(report.nbytes)\n"
        "registry.convert('a', 'b', to=3)\n"
    )
    check = (sys.executable, "-m", "mypy", "--python-executable", installed, "--cache-dir", tmp_path / "cache")
    done = subprocess.run([*check, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    revealed, refused = (line for line in done.stdout.splitlines() if line.startswith("script.py"))
    assert "script.py:3: note: Revealed type is" in revealed and "int" in revealed, done.stdout
    assert 'script.py:4: error: Argument "to" to "convert" has incompatible type "int"' in refused, done.stdout


def test_importing_it_is_light(installed, tmp_path):
    """Only names: what is heavy is loaded at first use."""
    program = (
        "import sys, time; start = time.perf_counter(); import registry; took = time.perf_counter() - start; "
        "print(took, *(name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules))"
    )
    runs = [run(installed, "-c", program, cwd=tmp_path).stdout.split() for _ in range(3)]
    assert [heavy for _, *heavy in runs] == [[], [], []]
    assert min(float(took) for took, *_ in runs) < 1.5
