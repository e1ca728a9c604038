"""The packages in examples/ are what a third party's would be: installed, they pass their own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
#: What an example needs besides the library.
NEEDS = {"registry-gguf": "gguf"}


def test_every_example_is_tried():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_installed_example_passes_its_tests(name, tmp_path):
    """Installed by pip beside the library, with its entry points and no path of the repository's examples."""
    pytest.importorskip(NEEDS[name])
    shutil.copytree(EXAMPLES / name, tmp_path / name)  # a build writes into the folder
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site]
    subprocess.run([*pip, tmp_path / name], check=True, timeout=120)
    shutil.move(tmp_path / name / "tests", tmp_path / "tests")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "tests"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " failed" not in done.stdout and " passed" in done.stdout
