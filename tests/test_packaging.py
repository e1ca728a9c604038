"""The wheel, installed away from the repository: complete, typed, and not to be shadowed by a user's own files.

In a fresh environment that has the wheel and what it depends on, and nothing of the repository, README and tutorials
are followed word for word, and the workflow and the commit hook of docs/ecosystem/ are run.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import yaml

from tests.running_docs import FOLLOWED, blocks

ROOT = Path(__file__).resolve().parent.parent
# A directory in the repository, and what it is called when it is installed.
PACKAGES = {"registry": "registry", "formats": "registry_formats", "mappings": "registry_mappings"}

# What a command of the borrowed packages runs.
MODULES = {"pip": "pip", "torchrun": "torch.distributed.run"}
ECOSYSTEM = ROOT / "docs" / "ecosystem"
# A spec of a user's own, and one with a mistake.
MINE = """\
kind: architecture
name: my_model
extends: llama
description: a Llama by another name
config: {constants: {model_type: my_model}}
"""
BROKEN = f'{MINE}tensors: {{"model.norm.weight": "final_norm.weight: hiden"}}\n'

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
        if path.suffix in (".py", ".yaml", ".typed", ".css", ".js")
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made of, so that nothing is left in the repository."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        copytree(ROOT / name, tree / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """The wheel."""
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
    for name in ("pip", "torchrun"):
        (home / "bin" / name).write_text(f'#!/bin/sh\nexec {python} -m {MODULES[name]} "$@"\n')
        (home / "bin" / name).chmod(0o755)
    return python


def offline(wheel: Path) -> dict[str, str]:
    """What lets `pip install` find the wheel, and take all else for installed."""
    return {
        "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_FIND_LINKS": str(wheel.parent),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip


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


def test_it_is_fit_for_pypi(wheel, tree):
    """twine finds nothing wrong; a source distribution makes the same wheel."""
    pytest.importorskip("twine")
    made = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "both", tree]
    run(*made, cwd=tree)
    again = next((tree / "both").glob("*.whl"))
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
    printed = run(sys.executable, "-m", "twine", "check", "--strict", *(tree / "both").iterdir(), cwd=tree).stdout
    assert printed.count("PASSED") == 2


@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.name)
def test_a_stranger_follows_a_page_word_for_word(page, installed, wheel, tree, hf_model, tmp_path):
    copytree(hf_model("llama3"), tmp_path / "llama")
    follow = (installed, "-P", ROOT / "tests" / "running_docs.py", page)
    printed = run(*follow, cwd=tmp_path, PAGES_PIP=str(tree), **offline(wheel)).stdout
    commands = [line for block in blocks(page) if block.why is None for line in block.text.splitlines()]
    assert printed.count("$ ") >= len([line for line in commands if line.startswith("$ ") and "echo $?" not in line])


def test_the_workflow_runs_step_by_step(installed, wheel, hf_model, tmp_path):
    """Each `run` of the workflow, as a runner does it: bash, in a clone, with a place for scratch files."""
    copytree(hf_model("llama3"), tmp_path / "tests" / "data" / "llama")
    (tmp_path / "mappings").mkdir()
    (tmp_path / "mappings" / "my_model.yaml").write_text(MINE)
    workflow = yaml.safe_load((ECOSYSTEM / "round-trip.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["round-trip"]["steps"] if "run" in step]
    assert len(steps) == 4
    runner = {"PATH": f"{installed.parent}{os.pathsep}{os.environ['PATH']}", "RUNNER_TEMP": str(tmp_path / "temp")}
    environment = runner | offline(wheel)
    printed = "".join(run("bash", "-e", "-c", step, cwd=tmp_path, **environment).stdout for step in steps)
    for said in ("my_model: megatron (tp2 pp2): back, bit for bit", "llama: megatron (tp2): back", "equal: "):
        assert said in printed


def test_the_workflow_is_one_to_github():
    pytest.importorskip("check_jsonschema")
    check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows")
    run(*check, ECOSYSTEM / "round-trip.yml", cwd=ROOT)


def test_the_commit_hook_lets_sound_specs_through_and_no_others(installed, tmp_path):
    pytest.importorskip("pre_commit")
    tool = (sys.executable, "-m", "pre_commit")
    run(*tool, "validate-manifest", ROOT / ".pre-commit-hooks.yaml", cwd=ROOT)
    (tmp_path / "mappings").mkdir()
    spec = tmp_path / "mappings" / "my_model.yaml"
    spec.write_text(MINE)
    (tmp_path / ".pre-commit-config.yaml").write_bytes((ECOSYSTEM / "pre-commit-config.yaml").read_bytes())
    run("git", "init", "-q", cwd=tmp_path)
    run("git", "add", ".", cwd=tmp_path)
    path = f"{installed.parent}{os.pathsep}{os.environ['PATH']}"
    inside = {"PATH": path, "PRE_COMMIT_HOME": str(tmp_path / "home"), "cwd": tmp_path}
    assert "Passed" in run(*tool, "run", "--all-files", **inside).stdout
    spec.write_text(BROKEN)
    run("git", "add", ".", cwd=tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)Failed.*axis 'hiden' of final_norm.weight is not declared"):
        run(*tool, "run", "--all-files", **inside)


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


# What a user's type checker needs to know of torch here: with all of torch, a check takes a minute.
TORCH = {
    "torch/__init__.pyi": "from . import nn, optim\nclass Tensor: ...\nclass dtype: ...\n",
    "torch/nn/__init__.pyi": "class Module: ...\n",
    "torch/optim/__init__.pyi": "class Optimizer: ...\n",
}
# A program that uses what the library offers, and what the types of its results are.
PROGRAM = """
import registry
import torch

def grow(done: int, total: int) -> None: ...

two = registry.Parallel(tp=2, pp=[1, 3])
reveal_type(registry.convert("a", "b", to="megatron", parallel=two, options={"layers": "stacked"}, progress=grow))
reveal_type(registry.convert("a", "b", to="megatron").nbytes)
reveal_type(registry.plan("a", to="trtllm", dtype="bfloat16"))
reveal_type(registry.plan("a", to="trtllm").files)
reveal_type(registry.inspect("a"))
reveal_type(registry.explain("a", "mlp.up.weight", to="trtllm"))
reveal_type(registry.verify("a", "b"))
reveal_type(bool(registry.verify("a")))
reveal_type(registry.diff("a", "b"))
reveal_type(registry.open("a"))
reveal_type(registry.open("a").parallel)
reveal_type(registry.open("a").names)
reveal_type(registry.open("a").view("huggingface"))
reveal_type(registry.open("a").view("huggingface")["lm_head.weight"])
for name, tensor in registry.stream("a", to="huggingface", rank=registry.Rank(tp=1)):
    reveal_type(name)
    reveal_type(tensor)
def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    newest = registry.Retention(last=1)
    reveal_type(registry.save("run", model=model, optimizer=optimizer, iteration=1, retention=newest))
    reveal_type(registry.load("run", model=model, optimizer=optimizer))
    reveal_type(registry.load("run", model=model).iteration)
reveal_type(registry.Checkpoints("run").resume(fresh=True))
reveal_type(registry.register("mine.yaml"))
reveal_type(registry.formats())
reveal_type(registry.architectures())
"""
REVEALED = [
    "registry.conversion.Report", "int", "registry.conversion.PlanReport", "dict[str, int]",
    "registry.inspection.Inspection", "registry.explanation.Explanation", "registry.verification.Verification", "bool",
    "registry.comparison.Comparison", "registry.checkpoint.Checkpoint", "registry.parallel.Parallel", "list[str]",
    "registry.checkpoint.View", "torch.Tensor", "str", "torch.Tensor", "registry.training.saving.Saved",
    "registry.training.loading.Loaded", "int", "registry.training.manager.Found | None", "str", "list[str]",
    "list[str]",
]  # fmt: skip
# Programs that are wrong, one a line.
WRONG = """
registry.convert("a", "b", to=3)
registry.convert("a", "b")
registry.convert("a", "b", to="megatron", tp=2)
registry.plan("a", to="megatron", parallel=2)
registry.stream("a", rank=0)
registry.Parallel(tp="2")
registry.nothing("a")
"""


def checked(installed: Path, folder: Path, program: str) -> list[str]:
    """What a user's strict mypy says of a program, line by line."""
    for name, text in TORCH.items():
        (folder / "stubs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "stubs" / name).write_text(text)
    skip = "[mypy-numpy.*,pydantic.*,ray.*,transformers.*]\nfollow_imports = skip\n"
    (folder / "mypy.ini").write_text(f"[mypy]\nstrict = true\nmypy_path = stubs\n{skip}")
    (folder / "program.py").write_text(program)
    check = (sys.executable, "-m", "mypy", "--python-executable", installed, "--cache-dir", folder / "cache")
    done = subprocess.run(
        [*check, "--no-pretty", "program.py"], cwd=folder, capture_output=True, text=True, timeout=250
    )
    assert not done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("program.py")]


def test_its_public_functions_are_typed(installed, tmp_path):
    """A user's strict mypy knows what every public function gives back, and finds calls that are wrong."""
    pytest.importorskip("mypy")
    program = PROGRAM + WRONG
    lines = checked(installed, tmp_path, program)
    revealed = [re.search(r'Revealed type is "(.*)"', line) for line in lines if ": note: Revealed" in line]
    found = [re.sub(r"\bbuiltins\.", "", match[1]) for match in revealed if match]
    assert [text.replace("torch._tensor.", "torch.") for text in found] == REVEALED, "\n".join(lines)
    first = PROGRAM.count("\n") + 2
    wrong = {int(line.split(":")[1]) for line in lines if ": error:" in line}
    assert wrong == set(range(first, first + len(WRONG.split("\n")) - 2)), "\n".join(lines)


def test_importing_it_is_light(installed, tmp_path):
    """Only names: what is heavy is loaded at first use."""
    program = (
        "import sys, time; start = time.perf_counter(); import registry; took = time.perf_counter() - start; "
        "print(took, *(name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules))"
    )
    runs = [run(installed, "-c", program, cwd=tmp_path).stdout.split() for _ in range(3)]
    assert [heavy for _, *heavy in runs] == [[], [], []]
    assert min(float(took) for took, *_ in runs) < 1.5
