"""Shell completion, in real shells on a real terminal: what TAB makes of the beginning of a line."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from registry.cli import main

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
#: How each reads its script, as docs/cli.md says.
READY = {
    "bash": "source {folder}/_registry",
    "zsh": "fpath=({folder} $fpath); autoload -Uz compinit; compinit -u -D",
    "fish": "source {folder}/_registry",
}
LINES = [
    ("registry conv", "registry convert"),
    ("registry convert lla", "registry convert llama"),
    ("registry convert a b --to tr", "registry convert a b --to trtllm"),
    ("registry inspect a --architecture qwen3_n", "registry inspect a --architecture qwen3_next"),
    ("registry plan a --to trtllm --dt", "registry plan a --to trtllm --dtype"),
    ("registry plan a --dtype bf", "registry plan a --dtype bfloat16"),
    ("registry convert a b --engine to", "registry convert a b --engine torchrun"),
    ("registry completion fi", "registry completion fish"),
    ("registry architectures --spec min", "registry architectures --spec mine.yaml"),
]


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(folder)
            environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "vt100", "LANG": "C.UTF-8"}
            os.execvpe(command[0], command, environment)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self, pattern: str, seconds: float) -> re.Match[str] | None:
        """What the shell says next that fits; None where it takes longer than that."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                return None
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:
                return None
        self.seen = self.seen[match.end() :]
        return match

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_tab(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    assert main(["completion", shell]) == 0
    (tmp_path / "_registry").write_text(capsys.readouterr().out)
    folder = tmp_path / "home"
    (folder / "llama").mkdir(parents=True)
    (folder / "mine.yaml").touch()
    terminal = Terminal(SHELLS[shell], folder)
    try:
        # What is waited for is typed with quotes in its middle, so that the terminal's echo is not taken for it.
        terminal.send(f"{READY[shell].format(folder=tmp_path)}; echo loa''ded\r")
        assert terminal.wait("loaded", 60), terminal.seen
        for i, (typed, wanted) in enumerate(LINES):
            # Keys are taken one by one: after TAB, to the line's begin, `echo`, and to its end.
            terminal.send(f"{typed}\t\x01echo do''ne{i}: \x05 ;\r")
            match = terminal.wait(rf"done{i}: ([^\r\n]*)", 30)
            assert match, (typed, terminal.seen)
            assert match[1].strip().rstrip("/").replace("/ ", " ") == wanted, typed
    finally:
        terminal.close()


def test_it_is_loaded_only_where_it_is_asked_for() -> None:
    from subprocess import run

    script = "import sys; from registry.cli import main; main(['formats']); sys.exit('shtab' in sys.modules)"
    assert run([sys.executable, "-c", script], capture_output=True, timeout=120).returncode == 0
