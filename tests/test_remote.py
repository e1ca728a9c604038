"""Checkpoints at URLs: a real S3 server on this machine behind a proxy that counts and breaks things, and memory://."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import fsspec
from fsspec.config import conf

import registry
from formats.safetensors_file import layout
from registry import ArgumentError, CheckpointError, Parallel, RegistryError, TargetError, manifest, sending
from registry.places import UNFINISHED, is_remote, place
from registry.testing import same_directory
from tests.goldens import golden
from tests.object_store import KEY, SECRET, Proxy, Request, object_store
from tests.test_legacy_optimizer import SHARDED, SIXTEEN

pytestmark = pytest.mark.timeout(240)

LAYOUTS = {
    "huggingface": None, "dcp": None, "megatron": Parallel(tp=2, pp=2), "megatron-legacy": Parallel(tp=2, pp=2),
    "trtllm": Parallel(tp=2, pp=2),
}  # fmt: skip
#: The least that S3 takes as a part is 5 MiB, and a sender may give a few bytes less than its own.
SMALL_PART = 6 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with object_store() as proxy:
        yield proxy


@pytest.fixture
def s3(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, with a bucket of its own behind it that holds nothing."""
    monkeypatch.setitem(conf, "s3", {"endpoint_url": server.url, "key": KEY, "secret": SECRET})
    server.clear()
    fs = fsspec.filesystem("s3")
    if not fs.exists("bucket"):
        fs.mkdir("bucket")
    for key in objects():
        fs.rm_file(key)
    server.clear()
    yield server
    server.clear()


def objects(under: str = "bucket") -> list[str]:
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    return list(fs.find(under))


def uploads() -> list[Any]:
    """Multipart uploads that nobody has ended."""
    found = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket="bucket")
    return list(found.get("Uploads", []))


@pytest.fixture(scope="module")
def wide(hf_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose file takes several parts: 34 MB in two large tensors, and small ones between."""
    folder = tmp_path_factory.mktemp("wide")
    source = hf_model("llama3")
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(65_536, 64, generator=torch.Generator().manual_seed(len(name)))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": 65_536}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PART", SMALL_PART)


# What goes in comes out.


def test_through_two_formats_and_back(s3: Proxy, hf_model: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_model("qwen2", "bfloat16", "200KB")
    registry.convert(source, "s3://bucket/megatron", to="megatron", parallel=Parallel(tp=2))
    registry.convert("s3://bucket/megatron", "s3://bucket/some/hf", to="huggingface")
    registry.convert("s3://bucket/some/hf", tmp_path / "back", to="huggingface")
    same_directory(source, tmp_path / "back")
    for url in ("s3://bucket/megatron", "s3://bucket/some/hf/"):
        whole = registry.verify(url)
        assert whole and whole.files > 3
        assert registry.verify(url, source)
    assert not [key for key in objects() if key.endswith(UNFINISHED)]
    assert not uploads()


@pytest.mark.parametrize("to", LAYOUTS)
def test_every_format_in_memory(to: str, hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """The same bytes as on a disk, which proves that files made in order are those made in any order."""
    source, url = hf_model("llama3", "bfloat16", "200KB"), f"memory://every/{to}"
    options = {"to": to, "parallel": LAYOUTS[to]}
    report = registry.convert(source, url, **options)
    registry.convert(source, tmp_path / "local", **options)
    assert report.target == url
    fs = fsspec.filesystem("memory")
    there = {key.removeprefix(f"/every/{to}/"): fs.cat_file(key) for key in fs.find(f"/every/{to}")}
    here = {p.relative_to(tmp_path / "local").as_posix(): p.read_bytes() for p in (tmp_path / "local").rglob("*.*")
            if p.is_file()}  # fmt: skip
    assert there.keys() == here.keys()
    assert [name for name in here if here[name] != there[name]] == []
    assert registry.verify(url) and registry.verify(url, source)
    assert registry.inspect(url).tensors == registry.inspect(tmp_path / "local").tensors
    planned = registry.plan(url, to="trtllm", parallel=Parallel(tp=2))
    assert planned.report.files == registry.plan(tmp_path / "local", to="trtllm", parallel=Parallel(tp=2)).report.files
    registry.convert(url, tmp_path / "back", to="huggingface")
    same_directory(source, tmp_path / "back")
    names = dict(registry.stream(url, to="huggingface"))
    expected = registry.open(source).view("huggingface")
    assert names.keys() == expected.keys()
    assert all(torch.equal(names[name], expected[name]) for name in names)


def test_the_rows_of_an_optimizer(s3: Proxy, tmp_path: Path) -> None:
    """Their sums are made of those of several slots in one archive, and of zeros between them."""
    options: dict[str, Any] = {"to": "megatron-legacy", "architecture": "llama", "options": SIXTEEN}
    registry.convert(golden(SHARDED), "s3://bucket/a", parallel=Parallel(tp=2, pp=2), **options)
    registry.convert("s3://bucket/a", tmp_path / "a", parallel=Parallel(), **options)
    registry.convert(golden(SHARDED), tmp_path / "b", parallel=Parallel(tp=2, pp=2), **options)
    registry.convert(tmp_path / "b", tmp_path / "c", parallel=Parallel(), **options)
    same_directory(tmp_path / "a", tmp_path / "c")
    keys = [key for key in objects() if key.endswith(".pt")]
    assert len([key for key in keys if key.endswith("distrib_optim.pt")]) == 4
    for key in keys:
        local = tmp_path / "b" / key.removeprefix("bucket/a/")
        assert fsspec.filesystem("s3").cat_file(key) == local.read_bytes(), key


def test_what_several_ranks_hold_is_fetched_once(s3: Proxy, wide: Path, tmp_path: Path) -> None:
    """The same embedding, and columns of the same rows."""
    registry.convert(wide, "s3://bucket/hf", to="huggingface")
    s3.clear()
    registry.convert("s3://bucket/hf", "s3://bucket/trtllm", to="trtllm", parallel=Parallel(tp=4))
    size = (wide / "model.safetensors").stat().st_size
    assert sum(r.received for r in s3.requests if r.path.startswith("/bucket/hf/")) < 1.2 * size
    registry.convert(wide, tmp_path / "trtllm", to="trtllm", parallel=Parallel(tp=4))
    registry.convert("s3://bucket/trtllm", tmp_path / "back", to="huggingface")
    same_directory(wide, tmp_path / "back")
    assert registry.verify("s3://bucket/trtllm", tmp_path / "trtllm")


def test_the_command_line(s3: Proxy, hf_model: Callable[..., Path], tmp_path: Path) -> None:
    source = hf_model("llama3", "bfloat16")
    for words in (
        ["convert", source, "s3://bucket/megatron", "--to", "megatron", "--tp", "2"],
        ["verify", "s3://bucket/megatron"],
        ["convert", "s3://bucket/megatron", tmp_path / "back", "--to", "huggingface"],
    ):
        done = command(s3, *words)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    same_directory(source, tmp_path / "back")


def command(s3: Proxy, *words: object) -> subprocess.CompletedProcess[str]:
    """The command line, with the place and the keys in the environment, as S3's own programs take them."""
    environment = {
        "AWS_ENDPOINT_URL": s3.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "registry", *map(str, words)], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


# Only what is needed travels.


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, str, int]:
    """A model of 215 MB, all zeros but for one tensor of 2 MB; that tensor's name and bytes."""
    hidden, ffn, vocab = 256, 4096, 200_000
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocab, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,),
        **{f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")},
        **{f"{layer}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        **{f"{layer}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")},
        f"{layer}mlp.down_proj.weight": (hidden, ffn),
    }  # fmt: skip
    name = f"{layer}mlp.up_proj.weight"
    head, entries, size = layout(((n, "bfloat16", shape) for n, shape in shapes.items()), {"format": "pt"})
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(config))
    with (tmp_path / "large" / "model.safetensors").open("wb") as file:
        file.write(head)
        file.seek(entries[name].begin)
        file.write(bytes(range(1, 129)) * (2 * ffn * hidden // 128))
        file.truncate(size)
    assert size > 200_000_000
    return tmp_path / "large", name, 2 * ffn * hidden


def test_one_tensor_of_a_large_checkpoint(s3: Proxy, large: tuple[Path, str, int]) -> None:
    source, name, nbytes = large
    fsspec.filesystem("s3").put(str(source), "bucket/large", recursive=True)
    s3.clear()
    found = registry.open("s3://bucket/large").view("huggingface")[name]
    assert nbytes <= s3.received() <= nbytes + 2_000_000
    assert len(s3.requests) < 30
    assert torch.equal(found, registry.open(source).view("huggingface")[name])
    assert found.view(torch.uint8).flatten()[:3].tolist() == [1, 2, 3]


# What breaks.


def test_an_upload_that_fails_once(s3: Proxy, wide: Path, tmp_path: Path, small_parts: None) -> None:
    failed: list[str] = []

    def fault(method: str, path: str) -> int | None:
        if method == "PUT" and not any(path == one for one in failed) and len(failed) < 3:
            failed.append(path)
            return 500
        return None

    s3.fault = fault
    registry.convert(wide, "s3://bucket/megatron", to="megatron", parallel=Parallel(tp=2))
    assert len(failed) == 3 and sum(request.is_part for request in s3.requests) > 4
    assert registry.verify("s3://bucket/megatron", wide)
    assert not uploads()


@pytest.mark.parametrize("to", ["huggingface", "megatron-legacy"])
@pytest.mark.parametrize("what", ["a part", "the end of a file", "a small file", "the manifest"])
def test_an_upload_that_fails(what: str, to: str, s3: Proxy, wide: Path, small_parts: None) -> None:
    def fault(method: str, path: str) -> int | None:
        if what == "a part":
            return 403 if method == "PUT" and "partNumber=3" in path else None
        if what == "the end of a file":
            return 403 if method == "POST" and "uploadId=" in path else None
        name = "config.json" if what == "a small file" else manifest.NAME
        return 403 if method == "PUT" and path.split("?")[0].endswith(name) else None

    s3.fault = fault
    with pytest.raises(TargetError, match="cannot be written") as raised:
        registry.convert(wide, "s3://bucket/out", to=to, parallel=None if to == "huggingface" else Parallel(tp=2))
    assert "AccessDenied" in str(raised.value) and SECRET not in str(raised.value)
    s3.fault = None
    assert objects() == [] and not uploads()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        registry.open("s3://bucket/out")


def test_a_server_that_fails_for_good(s3: Proxy, wide: Path, small_parts: None) -> None:
    s3.fault = lambda method, path: 500 if method == "PUT" and "partNumber=2" in path else None
    begun = time.monotonic()
    with pytest.raises(TargetError, match="InternalError"):
        registry.convert(wide, "s3://bucket/out", to="huggingface")
    assert time.monotonic() - begun < 60
    s3.fault = None
    assert objects() == [] and not uploads()


def test_what_fails_over_another_checkpoint_is_none(s3: Proxy, wide: Path, hf_model: Callable[..., Path]) -> None:
    """What was there cannot be brought back: nobody must take what is left of both for a checkpoint."""
    registry.convert(hf_model("gpt2"), "s3://bucket/out", to="megatron", parallel=Parallel(tp=2))
    with pytest.raises(TargetError, match="not empty"):
        registry.convert(wide, "s3://bucket/out", to="megatron")
    assert registry.verify("s3://bucket/out")
    s3.fault = lambda method, path: 403 if method == "PUT" and path.endswith("/common.pt") else None
    with pytest.raises(TargetError, match="cannot be written"):
        registry.convert(wide, "s3://bucket/out", to="megatron", overwrite=True)
    s3.fault = None
    for url in ("s3://bucket/out", "s3://bucket/out/release"):
        with pytest.raises(CheckpointError, match="has not ended"):
            registry.open(url)
    with pytest.raises(TargetError, match="has not ended"):
        registry.convert(wide, "s3://bucket/out", to="megatron")
    registry.convert(wide, "s3://bucket/out", to="megatron", overwrite=True)
    assert registry.verify("s3://bucket/out") and registry.verify("s3://bucket/out", wide)
    assert not [key for key in objects() if key.endswith("__1_0.distcp")]  # what only the one before had


def test_nobody_reads_what_is_being_uploaded(s3: Proxy, wide: Path) -> None:
    refused: list[str] = []

    def progress(done: int, total: int) -> None:
        with pytest.raises(CheckpointError, match="has not ended") as raised:
            registry.open("s3://bucket/out")
        refused.append(str(raised.value))

    registry.convert(wide, "s3://bucket/out", to="huggingface", progress=progress)
    assert len(refused) >= 2
    assert registry.open("s3://bucket/out").format == "huggingface"


def test_an_interrupted_upload(s3: Proxy, wide: Path, small_parts: None) -> None:
    def progress(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.convert(wide, "s3://bucket/out", to="huggingface", progress=progress)
    assert objects() == [] and not uploads()


def test_two_runs_with_one_target(s3: Proxy, wide: Path) -> None:
    """The second has put its mark: the first must neither end as if nothing were, nor remove what is the other's."""

    def progress(done: int, total: int) -> None:
        fsspec.filesystem("s3").pipe_file(f"bucket/out/{UNFINISHED}", b"another")

    with pytest.raises(TargetError, match="another run"):
        registry.convert(wide, "s3://bucket/out", to="huggingface", progress=progress)
    assert f"bucket/out/{UNFINISHED}" in objects()
    assert f"bucket/out/{manifest.NAME}" not in objects()


def test_a_source_that_changes(s3: Proxy, hf_model: Callable[..., Path]) -> None:
    source = hf_model("llama3", "bfloat16")
    fs = fsspec.filesystem("s3")
    fs.put(str(source), "bucket/hf", recursive=True)
    view = registry.open("s3://bucket/hf").view("huggingface")
    data = bytearray(fs.cat_file("bucket/hf/model.safetensors"))
    data[-1] ^= 1
    fs.pipe_file("bucket/hf/model.safetensors", bytes(data))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        view["lm_head.weight"]


def test_a_truncated_source(s3: Proxy, hf_model: Callable[..., Path]) -> None:
    fs = fsspec.filesystem("s3")
    for name in ("huggingface", "megatron", "megatron-legacy"):
        registry.convert(hf_model("llama3"), f"s3://bucket/{name}", to=name)
        key = max((key for key in objects(f"bucket/{name}")), key=fs.size)
        fs.pipe_file(key, fs.cat_file(key)[:-1000])
        assert not registry.verify(f"s3://bucket/{name}")
        with pytest.raises(CheckpointError, match=key.rpartition("/")[2]):
            registry.open(f"s3://bucket/{name}")


@pytest.mark.parametrize("what", ["no bucket", "forbidden", "down"])
def test_a_place_that_cannot_be_used(what: str, s3: Proxy, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = "absent" if what == "no bucket" else "bucket"
    if what == "forbidden":
        s3.fault = lambda method, path: 403
    if what == "down":
        monkeypatch.setitem(conf, "s3", {"endpoint_url": "http://127.0.0.1:9", "key": KEY, "secret": SECRET})
    begun = time.monotonic()
    calls: list[Callable[[], object]] = [
        lambda: registry.open(f"s3://{bucket}/model"),
        lambda: registry.convert(wide, f"s3://{bucket}/out", to="megatron"),
    ]
    for kind, call in zip((CheckpointError, TargetError), calls, strict=True):
        with pytest.raises(kind) as raised:
            call()
        assert f"s3://{bucket}" in str(raised.value) and SECRET not in str(raised.value)
    assert time.monotonic() - begun < 60


# What is refused, and what is never said.


@pytest.mark.parametrize(
    "url", ["zz://bucket/x", "s3://", "s3:///", "memory://a?token=Qm9zcXVl", "file://host/x", "a b://c/d"]
)
def test_no_such_urls(url: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        registry.open(url)
    assert "Qm9zcXVl" not in str(raised.value)


def test_file_urls_are_local(hf_model: Callable[..., Path]) -> None:
    source = hf_model("llama3")
    assert not is_remote(place(source.as_uri()))
    assert registry.open(source.as_uri()).format == "huggingface"


def test_what_one_process_alone_can_do(hf_model: Callable[..., Path]) -> None:
    source = hf_model("llama3")
    for how in ({"engine": "ray"}, {"ranks": [0], "to": "trtllm"}):
        with pytest.raises(ArgumentError, match="one process"):
            registry.convert(source, "memory://out", **{"to": "megatron", **how})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="only local paths"):
        registry.Checkpoints("memory://run")


def test_source_and_target_overlap(hf_model: Callable[..., Path]) -> None:
    registry.convert(hf_model("llama3"), "memory://overlap/hf", to="huggingface")
    for target in ("memory://overlap/hf", "memory://overlap/hf/out", "memory://overlap"):
        with pytest.raises(TargetError, match="overlap"):
            registry.convert("memory://overlap/hf", target, to="megatron", overwrite=True)
    assert registry.verify("memory://overlap/hf")


def test_secrets_are_not_said(s3: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    password = "hUnTeR2pAsSwOrD"
    with caplog.at_level("DEBUG", "registry"):
        for url in (
            f"s3://user:{password}@bucket/x", f"zz://user:{password}@host/x", f"ftp://user:{password}@127.0.0.1:9/x",
            f"https://127.0.0.1:9/x?X-Amz-Signature={password}", f"s3://bucket/x?token={password}",
        ):  # fmt: skip
            for call in (registry.open, registry.verify, lambda url: registry.convert("absent", url, to="megatron")):
                with pytest.raises(RegistryError) as raised:
                    call(url)
                error = raised.value
                fields = (error.problem, error.where, error.expected, error.found, error.hint, *error.details)
                assert password not in str(error) + repr(error) + " ".join(map(str, fields))
                assert password not in "".join(traceback.format_exception(error))
    assert password not in caplog.text
    done = command(s3, "inspect", "--json", f"s3://user:{password}@bucket/x")
    assert done.returncode == 1 and password not in done.stdout + done.stderr
    s3.fault = lambda method, path: 403
    done = command(s3, "convert", "s3://bucket/x", "s3://bucket/y", "--to", "megatron")
    assert done.returncode == 1 and SECRET not in done.stdout + done.stderr and "AccessDenied" in done.stderr


def test_what_is_counted(s3: Proxy) -> None:
    """The proxy sees what travels: a test that counts nothing would prove nothing."""
    fs = fsspec.filesystem("s3")
    fs.pipe_file("bucket/thing", bytes(100_000))
    s3.clear()
    assert fs.cat_file("bucket/thing", start=10, end=50_010) == bytes(50_000)
    assert [Request("GET", "/bucket/thing", 0, 50_000, 206)] == s3.requests
