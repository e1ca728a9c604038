"""The command `registry`: its verbs, flags, exit codes, output for people and for programs, and its progress line."""

import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import registry
from registry import commands
from registry.arguments import COMMANDS
from registry.cli import main
from registry.progress import ProgressLine, clock_face, fit, parts

DOCS = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
VERBS = tuple(COMMANDS)

# Runs the command with slow workers; "writing" on stdout says that the first one is at work.
SLOW = """
import sys, threading, time
from registry import cli, files
write = files.TargetFiles.write
def slow(self, *arguments):
    if threading.current_thread() is not threading.main_thread():
        sys.stdout.write("writing\\n")  # in one piece, whatever other workers write
        sys.stdout.flush()
        time.sleep({seconds})
    return write(self, *arguments)
files.TargetFiles.write = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def llama(hf_model, tmp_path, monkeypatch):
    """The working directory, with a tiny Llama in `llama`."""
    shutil.copytree(hf_model("llama3"), tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """`run("convert a b --to trtllm")`: (exit code, stdout, stderr) of a command in this process."""

    def run(line):
        capsys.readouterr()
        try:
            code = main(shlex.split(line))
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def called(monkeypatch):
    """Replaces a public function, and remembers what it was called with."""
    calls = []

    class Reported:
        problem, equal = None, True

        def estimate(self, target, *, threads):
            calls.append((target, threads))
            return self

        def as_dict(self):
            return {"nan": float("nan"), "path": Path("x"), 3: (1, 2)}

        def __str__(self):
            return "reported"

    def replace(name):
        def fake(*positional, **named):
            calls.append((positional, named))
            return Reported()

        monkeypatch.setitem(vars(registry), name, fake)
        return calls

    return replace


def command(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "registry.cli", *arguments], text=True, **options)


# --- every verb -------------------------------------------------------------------------------------------------------


def test_convert_there_and_back_is_the_same_model(llama, run):
    code, out, err = run("convert llama megatron --to megatron --tp 2 --pp 1,3 --option layers=per_layer")
    assert (code, err) == (0, "")
    assert out.startswith("llama: huggingface -> megatron (tp2 pp2 layers 1+3)\n")
    assert run("convert megatron back --to huggingface --threads 1 --no-sync")[0] == 0
    assert run("verify llama back") == (0, "equal: 39 logical tensors, bit for bit\n", "")


def test_verify_exits_with_1_where_models_differ(llama, run):
    assert run("convert llama half --to huggingface --dtype bfloat16 --quiet") == (0, "", "")
    code, out, err = run("verify llama half")
    assert (code, err) == (1, "")
    assert out.startswith("different: 39 of 39 logical tensors\n")
    assert run("verify llama half --quiet") == (1, "", "")
    code, out, err = run("verify llama half --json")
    found = json.loads(out)
    assert (code, err, found["equal"], len(found["differences"])) == (1, "", False, 39)


def test_plan_writes_nothing(llama, run):
    code, out, err = run("plan llama --to trtllm --tp 2")
    assert (code, err) == (0, "")
    assert "rank1.safetensors" in out
    assert [path.name for path in llama.iterdir()] == ["llama"]


def test_inspect(llama, run):
    code, out, err = run("inspect llama")
    assert (code, err) == (0, "")
    assert "architecture  llama" in out


def test_explain(llama, run):
    code, out, err = run("explain llama decoder.layers.1.mlp.linear_fc1.weight --to megatron-legacy --tp 2 --json")
    assert (code, err) == (0, "")
    parts = [part for one in json.loads(out)["stored"] for part in one["parts"]]
    assert {place["name"] for part in parts for place in part["places"]} == {
        "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    }  # fmt: skip
    assert "holds   mlp.up.weight  layer 2" in run("explain llama mlp.up.weight.2")[1]
    code, _, err = run("explain llama mlp.up.weigth")
    assert code == 1 and "mlp.up.weight" in err


def test_verify_one(llama, run):
    assert run("convert llama out --to megatron --tp 2 --quiet")[0] == 0
    assert run("verify out")[1].startswith("whole: ")
    data = next(Path("out/release").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    code, out, _ = run("verify out")
    assert code == 1 and data.name in out
    code, _, err = run("verify llama")
    assert code == 1 and "no manifest" in err


def test_view_shows_a_tensor_as_it_is(llama, run):
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = registry.open("llama").view("huggingface")[name]
    code, out, err = run(f"view llama {name} --to huggingface --json")
    shown = json.loads(out)
    assert (code, err) == (0, "")
    assert (shown["name"], shown["format"]) == (name, "huggingface")
    assert (shown["shape"], shown["dtype"]) == ([64, 160], "float32")
    assert (shown["min"], shown["max"]) == (tensor.min().item(), tensor.max().item())
    assert shown["mean"] == pytest.approx(tensor.double().mean().item(), rel=1e-12)
    assert shown["values"] == tensor.flatten()[:8].tolist()
    code, out, _ = run(f"view llama {name} --to huggingface")
    assert code == 0
    assert out.splitlines()[:4] == [f"name    {name}", "format  huggingface", "shape   [64, 160]", "dtype   float32"]
    assert out.endswith(" ...\n")


def test_view_of_one_rank(llama, run):
    line = "view llama transformer.layers.0.mlp.fc.weight --to trtllm --tp 2 --dtype bf16 --json"
    ranks = [json.loads(run(f"{line} {rank}")[1]) for rank in ("", "--rank tp=0", "--rank pp=0,tp=1")]
    assert ranks[0] == ranks[1] != ranks[2]
    assert (ranks[2]["shape"], ranks[2]["dtype"]) == ([80, 64], "bfloat16")


def test_view_lists_the_names_that_fit_a_pattern(llama, run):
    code, out, _ = run("view llama 'model.layers.?.self_attn.k_proj*' --to huggingface")
    assert code == 0
    assert out.splitlines() == [f"model.layers.{i}.self_attn.k_proj.weight  float32  [32, 64]" for i in range(4)]
    listed = json.loads(run("view llama '*' --to huggingface --json")[1])["tensors"]
    assert listed["lm_head.weight"] == {"shape": [131, 64], "dtype": "float32"}
    assert len(listed) == 39


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("lm_head.weigh --to huggingface", "such as lm_head.weight"),
        ("'nothing*' --to huggingface", "no tensor 'nothing*'"),
        ("'*' --to trtllm --tp 2 --rank tp=2", "choose another --rank"),
        ("'*' --to huggingface --rank tp=1", "has no files of single ranks"),
        ("lm_head.weight --to huggingface --dtype int8", "floating-point"),
        ("lm_head.weight --to huggingface --dtype half-precision", "unknown dtype"),
        ("'*' --to trtllm --rank tq=1", "is not a rank"),
        ("'*' --to trtllm --rank tp=x", "is not a rank"),
    ],
)
def test_view_of_what_is_not_there(llama, run, arguments, problem):
    code, out, err = run(f"view llama {arguments}")
    assert (code, out) == (2, "")
    assert problem in err


def test_statistics_of_odd_tensors():
    import torch

    found = commands._statistics(torch.cat([torch.zeros(1 << 20), torch.tensor([float("nan"), -3.0])]))
    assert all(str(found[key]) == "nan" for key in ("min", "max", "mean"))
    found = commands._statistics(torch.cat([torch.ones(1 << 20), torch.tensor([-2.0])]))
    assert (found["min"], found["max"], found["values"]) == (-2.0, 1.0, [1.0] * 8)
    assert commands._statistics(torch.zeros(0, 4)) == {"min": None, "max": None, "mean": None, "values": []}
    assert commands._statistics(torch.tensor(True)) == {"min": 1.0, "max": 1.0, "mean": 1.0, "values": [True]}
    assert commands._statistics(torch.zeros(2, dtype=torch.complex64))["min"] is None
    for name in ("float8_e4m3fn", "float8_e5m2", "int8", "uint16", "bfloat16"):
        assert commands._statistics(torch.ones(3).to(getattr(torch, name)))["mean"] == 1.0


def test_formats_and_architectures_list_all(run):
    code, out, err = run("formats")
    assert (code, err) == (0, "")
    named = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert named == registry.formats()
    specs = json.loads(run("formats --json")[1])
    for name, spec in specs.items():
        assert spec["kind"] == "format"
        assert spec["name"] == name
        for option, said in spec["options"].items():
            assert f"--option {option}={commands._value(said['default'])}: " in out
    code, out, err = run("architectures")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == registry.architectures()
    assert json.loads(run("architectures --json")[1])["llama"]["tensors"]


def test_schema_is_the_json_schema(run):
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == registry.schema()


def test_version_and_help(run):
    assert run("--version") == (0, f"registry {registry.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for verb in VERBS:
        assert f"    {verb} " in out or f"    {verb}\n" in out
        assert run(f"{verb} --help")[0] == 0


# --- every flag -------------------------------------------------------------------------------------------------------

DEFAULTS = {"to": "trtllm", "parallel": None, "dtype": None, "options": None, "config": None, "architecture": None}
WRITING = {"ranks": None, "overwrite": False, "threads": None, "durable": True, "progress": None, "engine": "local"}
EVERY_READING_FLAG = "--config conf --architecture mistral"
READ = {"config": "conf", "architecture": "mistral"}
EVERY_LAYOUT_FLAG = (
    "--to megatron --tp 2 --pp 3,5 --vpp 2 --ep 4 --etp 1 --cp 6 --dp 7 --dtype bf16 "
    "--option a=1 --option b=true --option c=text --option 'd=\"1\"' --option e= --option f=x=y --option g=null"
)
LAID_OUT = {"a": 1, "b": True, "c": "text", "d": "1", "e": "", "f": "x=y", "g": None}


def wanted():
    parallel = registry.Parallel(tp=2, pp=[3, 5], vpp=2, ep=4, etp=1, cp=6, dp=7)
    return {"to": "megatron", "parallel": parallel, "dtype": "bf16", "options": LAID_OUT}


def test_the_flags_of_convert(run, called):
    calls = called("convert")
    assert run("convert a b --to trtllm") == (0, "reported\n", "")
    writing = "--ranks 0,3 --overwrite --threads 3 --engine ray --no-sync --quiet"
    assert run(f"convert a b {EVERY_LAYOUT_FLAG} {EVERY_READING_FLAG} {writing}") == (0, "", "")
    assert calls == [
        (("a", "b"), DEFAULTS | WRITING),
        (
            ("a", "b"),
            {
                **wanted(),
                **READ,
                "ranks": [0, 3],
                "overwrite": True,
                "threads": 3,
                "durable": False,
                "progress": None,
                "engine": "ray",
            },
        ),
    ]
    assert calls[1][1]["parallel"].layers == (3, 5)


def test_the_flags_of_plan_inspect_verify_and_diff(run, called):
    calls = called("plan")
    assert run("plan a --to trtllm")[0] == run(f"plan a b --threads 3 {EVERY_LAYOUT_FLAG} {EVERY_READING_FLAG}")[0] == 0
    assert calls == [(("a",), DEFAULTS), (None, None), (("a",), wanted() | READ), ("b", 3)]
    del calls[:]
    called("inspect")
    assert run(f"inspect a {EVERY_READING_FLAG}")[0] == 0
    called("verify")
    assert run(f"verify a b {EVERY_READING_FLAG} --json")[0] == 0
    called("diff")
    assert run(f"diff a b {EVERY_READING_FLAG} --json")[0] == 0
    read = READ | {"progress": None}
    assert calls == [(("a",), READ), (("a", "b"), read), (("a", "b"), read)]


def test_json_has_no_values_that_json_lacks(run, called):
    called("inspect")
    _, out, _ = run("inspect a --json")
    assert json.loads(out, parse_constant=pytest.fail) == {"nan": "nan", "path": "x", "3": [1, 2]}


def test_a_config_and_an_architecture_for_a_checkpoint_without(llama, run):
    assert run("convert llama megatron --to megatron --quiet")[0] == 0
    for carried in ("registry.json", "config.json"):
        for path in (llama / "megatron").rglob(carried):
            path.unlink()
    assert run("inspect megatron --config llama --architecture llama")[0] == 0
    assert run("inspect megatron --config nowhere")[0] == 1
    assert run("inspect megatron --architecture unheard-of")[0] == 1


def test_a_spec_is_registered_first_and_bad_ones_refused(llama, run):
    spec = llama / "mine.yaml"
    # The process forgets nothing that was registered, so another one is asked.
    spec.write_text("kind: architecture\nname: of-mine\nextends: llama\ndescription: Mine\n")
    done = command("architectures", "--spec", str(spec), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, "")
    assert re.search(r"^of-mine +Mine$", out, re.MULTILINE)
    spec.write_text("kind: architecture\nname: of-mine\nextends: nothing\n")
    code, out, err = run(f"inspect llama --spec {spec}")
    assert (code, out) == (1, "")
    assert "extends an unknown architecture" in err
    assert run("formats --spec nowhere.yaml")[0] == 1


def test_overwrite(llama, run):
    assert run("convert llama out --to trtllm --quiet")[0] == 0
    assert run("convert llama out --to trtllm --quiet")[0] == 1
    assert run("convert llama out --to huggingface --quiet --overwrite")[0] == 0
    assert run("verify llama out --quiet")[0] == 0


@pytest.mark.parametrize(
    "line",
    [
        "convert llama out --to megatron --tp 2",
        "plan llama --to megatron --pp 1,3",
        "inspect llama",
        "verify llama llama",
        "diff llama llama",
        "explain llama lm_head.weight --to trtllm",
        "schema",
        "completion fish",
        "view llama lm_head.weight --to huggingface",
        "formats",
        "architectures",
    ],
)
def test_json_is_all_that_stdout_holds(llama, run, line):
    code, out, err = run(f"{line} --json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out, parse_constant=pytest.fail), dict)


# --- exit codes and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "code", "kind", "problem"),
    [
        ("convert llama out --to nothing", 2, "ArgumentError", "unknown format 'nothing'"),
        ("convert llama out --to megatron --option x=1", 2, "ArgumentError", "bad options for megatron"),
        ("convert llama out --to megatron --option layers=1", 2, "ArgumentError", "bad options for megatron"),
        ("convert llama out --to megatron --tp 0", 2, "ArgumentError", "bad parallel layout"),
        ("convert llama out --to megatron --threads 0", 2, "ArgumentError", "invalid arguments"),
        ("convert llama out --to megatron --dtype float33", 2, "ArgumentError", "unknown dtype"),
        ("convert '' out --to megatron", 2, "ArgumentError", "invalid arguments"),
        ("convert nowhere out --to megatron", 1, "CheckpointError", "no such checkpoint"),
        ("convert llama full --to megatron", 1, "TargetError", "the target is not empty"),
        ("convert llama llama/out --to megatron", 1, "TargetError", "source and target overlap"),
        ("convert llama out --to megatron --pp 3", 1, "ParallelError", "layers do not divide over pipeline stages"),
        ("convert llama out --to megatron --pp 1,1", 1, "ParallelError", "stages do not add up"),
        ("verify llama nowhere", 1, "CheckpointError", "no such checkpoint"),
        ("inspect full", 1, "DetectionError", "no known format fits"),
        ("inspect llama --architecture unheard-of", 1, "DetectionError", "unknown architecture 'unheard-of'"),
        ("diff llama nowhere", 1, "CheckpointError", "no such checkpoint"),
    ],
)
def test_what_is_refused(llama, run, line, code, kind, problem):
    (llama / "full").mkdir()
    (llama / "full" / "file").touch()
    found, out, err = run(line)
    assert (found, out) == (code, "")
    assert err.startswith(f"registry: {problem}")
    assert re.search(r"^  to do: \S", err, re.MULTILINE)
    assert "Traceback" not in err
    found, out, err = run(f"{line} --json")
    assert (found, out, err.count("\n")) == (code, "", 1)
    error = json.loads(err)["error"]
    assert (error["type"], error["problem"]) == (kind, problem)
    assert set(error) == {"type", "problem", "where", "expected", "found", "hint", "details"}
    assert sorted(path.name for path in llama.iterdir()) == ["full", "llama"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "transmogrify a",
        "convert a b",
        "convert a --to megatron",
        "convert a b --to megatron --pp x",
        "convert a b --to megatron --pp 1,,2",
        "convert a b --to megatron --tp 1.5",
        "convert a b --to megatron --option layers",
        "convert a b --to megatron --option =1",
        "convert a b --to megatron --json --quiet",
        "convert a b --to megatron --over",
        "inspect a --tp 2",
        "verify",
        "verify a b c",
        "diff a",
        "completion tcsh",
        "view a --to megatron",
    ],
)
def test_usage(run, line):
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert err.startswith("usage: registry")


def test_what_nobody_expected_keeps_its_traceback(called, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setitem(vars(registry), "inspect", broken)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "a"])


def test_an_error_says_where_json_cannot(run, monkeypatch):
    def refuse(*_, **__):
        raise registry.CheckpointError("no", where=Path("a"), expected=float("inf"), found={1}, details=["x", "y"])

    monkeypatch.setitem(vars(registry), "inspect", refuse)
    code, _, err = run("inspect a --json")
    assert code == 1
    assert json.loads(err, parse_constant=pytest.fail)["error"] == {
        "type": "CheckpointError", "problem": "no", "where": "a", "expected": "inf", "found": [1],
        "hint": registry.CheckpointError.advice,
        "details": ["x", "y"],
    }  # fmt: skip


def test_paths_that_no_encoding_has_a_name_for(llama, run):
    name = os.fsdecode(b"out\xff")
    code = main(["convert", "llama", name, "--to", "trtllm"])
    assert (code, (llama / name).is_dir()) == (0, True)
    assert main(["inspect", name]) == 0
    assert main(["inspect", name, "--json"]) == 0
    assert main(["inspect", name + "x"]) == 1


# --- as a process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["convert", "--help"], ["convert", "a", "--pp", "x"]])
def test_nothing_heavy_is_loaded_for_help(arguments):
    # -S leaves out what .pth files of the environment load, and with them the heavy packages: an import of one fails.
    script = (
        "import contextlib, io, sys\n"
        "import registry.cli\n"
        "if sys.argv[1:]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        with contextlib.redirect_stderr(io.StringIO()): registry.cli.main(sys.argv[1:])\n"
        "print(*sys.modules)\n"
    )
    root = Path(registry.__file__).parent.parent
    line = [sys.executable, "-S", "-c", script, *arguments]
    loaded = subprocess.run(line, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "pydantic", "yaml", "attr", "attrs", "packaging", "transformers", "safetensors"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    ours = {name for name in loaded if name.split(".")[0] == "registry"}
    light = {"arguments", "cli", "colours", "commands", "engines", "errors", "redaction"}
    assert ours == {"registry", *(f"registry.{name}" for name in light)}


@pytest.mark.parametrize("arguments", [["formats"], ["schema"], ["--help"], ["--version"], ["inspect", "nowhere"]])
def test_a_reader_that_has_gone_away_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    if arguments == ["inspect", "nowhere"]:
        process = command(*arguments, stdout=subprocess.PIPE, stderr=write)
        assert (process.communicate(timeout=60)[0], process.returncode) == ("", 1)
    else:
        process = command(*arguments, stdout=write, stderr=subprocess.PIPE)
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    os.close(write)


def interrupted(folder, seconds, line):
    """Start a slow conversion in `folder` and interrupt it once a worker writes. Returns (process, stderr, seconds)."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(seconds=seconds), *shlex.split(line)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A parent that ignores SIGINT, such as a shell's background job, would have its children ignore it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "writing\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        return process.returncode, err, time.monotonic() - start
    finally:
        process.kill()


def test_ctrl_c_leaves_nothing_behind(llama):
    code, err, _ = interrupted(llama, 0.3, "convert llama out --to trtllm --tp 4 --threads 2")
    assert (code, err) == (130, "registry: interrupted\n")
    assert [path.name for path in llama.iterdir()] == ["llama"]


def test_ctrl_c_does_not_harm_what_was_there(llama, run):
    assert run("convert llama out --to trtllm --quiet")[0] == 0
    code, err, _ = interrupted(llama, 0.3, "convert llama out --to huggingface --overwrite --dtype bfloat16")
    assert (code, err) == (130, "registry: interrupted\n")
    assert sorted(path.name for path in llama.iterdir()) == ["llama", "out"]
    assert run("verify llama out --quiet")[0] == 0


def test_ctrl_c_does_not_wait_for_the_rest(llama):
    code, _, seconds = interrupted(llama, 1.0, "convert llama out --to trtllm --tp 8 --threads 1")
    assert code == 130
    assert seconds < 5  # The tile at hand is finished; all eight would take eight seconds.


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Remembers each drawing; behaves as a terminal that has no file descriptor."""

    def drawings(self):
        return [line for line in self.getvalue().split("\r") if line.strip()]


def test_the_line_says_how_far_how_fast_and_how_long(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    terminal, now = Terminal(), [0.0]
    with ProgressLine(terminal, clock=lambda: now[0]) as line:
        for step in range(5):
            now[0] = float(step)
            line(2_000_000_000 * step, 10_000_000_000)
    assert [each.rstrip() for each in terminal.drawings()] == [
        "  0%  0.0 of 10.0 GB",
        " 20%  0:04 left  2.00 GB/s  2.0 of 10.0 GB",
        " 40%  0:03 left  2.00 GB/s  4.0 of 10.0 GB",
        " 60%  0:02 left  2.00 GB/s  6.0 of 10.0 GB",
        " 80%  0:01 left  2.00 GB/s  8.0 of 10.0 GB",
    ]
    assert terminal.getvalue().endswith("\r" + " " * 42 + "\r")


def test_the_line_is_drawn_ten_times_a_second_and_never_goes_back(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    terminal, now = Terminal(), [0.0]
    line = ProgressLine(terminal, clock=lambda: now[0])
    for step in range(1001):
        now[0] = step / 1000
        line(step, 1000)
    assert 9 <= len(terminal.drawings()) <= 11
    now[0] = 2.0
    drawn = len(terminal.drawings())
    line(500, 1000)  # A worker that was late.
    assert len(terminal.drawings()) == drawn


@pytest.mark.parametrize("columns", [1, 5, 6, 20, 30, 45, 200])
def test_the_line_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal, now = Terminal(), [0.0]
    with ProgressLine(terminal, clock=lambda: now[0]) as line:
        for step in range(100):
            now[0] = step * 0.5
            line(step * 10_000_000, 1_000_000_000)
    assert max(map(len, terminal.getvalue().split("\r"))) < columns


def test_parts_of_the_line():
    assert parts(0, 0, None) == ["100%", "0.0 of 0.0 MB"]
    assert parts(999, 1000, None)[0] == " 99%"
    assert fit(["abc", "def", "ghi"], 8) == "abc  def"
    assert fit(["abc", "def"], 2) == "ab"
    times = {0: "0:00", 59.6: "1:00", 61: "1:01", 3599: "59:59", 3600: "1:00:00", 90061: "25:01:01"}
    assert {seconds: clock_face(seconds) for seconds in times} == times


def test_a_terminal_that_goes_away_stops_nothing():
    tried = []

    class Gone(Terminal):
        def flush(self):
            tried.append(self)
            raise OSError

    with ProgressLine(Gone()) as line:
        line(1, 2)
        line(2, 2)
    assert tried


def on_a_terminal(folder, line, columns=100):
    """What a slow command shows on a terminal that is its stderr, and its stdout, which is a pipe."""
    control, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SLOW.format(seconds=0.15), *shlex.split(line)],
        cwd=folder, stdout=subprocess.PIPE, stderr=terminal, env=environment, text=True,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side of a terminal is closed.
        while data := os.read(control, 65536):
            shown += data
    os.close(control)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return shown.decode(), out.replace("writing\n", "")


def test_progress_on_a_terminal(llama):
    line = "convert llama out --to trtllm --tp 4 --threads 1"
    shown, out = on_a_terminal(llama, line)
    assert re.search(r"\r +\d+%  \d:\d\d left  \d\.\d\d GB/s  \d\.\d of \d\.\d MB *\r", shown), shown
    assert shown.endswith(" \r")  # erased
    assert "\n" not in shown
    assert out.startswith("llama: huggingface -> trtllm (tp4)\n")
    narrow, _ = on_a_terminal(llama, f"{line} --overwrite", columns=12)
    assert re.fullmatch(r"(\r[ \d]\d\d%| {4}|\r)+", narrow), narrow


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_no_progress_where_it_is_not_wanted(llama, flag):
    shown, out = on_a_terminal(llama, f"convert llama out --to trtllm --tp 4 --threads 1 {flag}")
    assert shown == ""
    assert (out == "") == (flag == "--quiet")


def test_no_progress_where_stderr_is_no_terminal(llama):
    line = ["convert", "llama", "out", "--to", "trtllm", "--tp", "4"]
    done = subprocess.run(
        [sys.executable, "-c", SLOW.format(seconds=0.15), *line], cwd=llama, capture_output=True, check=True
    )
    assert done.stderr == b""


# --- the reference ----------------------------------------------------------------------------------------------------


def test_the_reference_names_every_command_and_flag(capsys):
    text = DOCS.read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"`{verb}" in text and re.search(rf"^\$ registry {verb}\b", text, re.MULTILINE), verb
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}:
            assert f"`{flag}" in text, flag
