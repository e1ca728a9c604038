"""Finds the goldens: checkpoints that Megatron's, Megatron-Bridge's and TensorRT-LLM's own code wrote.

A fresh clone has the small ones, packed in tests/golden (they share most of their bytes, so that packing makes them a
quarter); they are unpacked beside it at the first use, and checked against MANIFEST.json. All of them are in
../shared/golden where that exists. `python -m tests.goldens` packs them again from there.

    golden("megatron/llama/tp2pp2")             # its path, or the test is skipped
    @pytest.mark.parametrize("case", megatron_cases(), ids=str)
"""

import hashlib
import io
import json
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKED = Path(__file__).resolve().parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden"

# What a fresh clone needs, by the archive that holds it: files and directories, or patterns of them.
CONTENTS = {
    "megatron": [
        *(f"megatron/{family}/hf" for family in ("gpt2", "llama", "qwen2", "qwen3")),
        *(f"megatron/{family}/reference_logits.safetensors" for family in ("gpt2", "llama", "qwen2", "qwen3")),
        *(f"megatron/llama/{case}" for case in ("tp1pp1", "tp2pp2", "tp1pp2vp2", "tp1pp1_bf16", "tp1pp1_optim")),
        *(f"megatron/llama/{case}" for case in ("tp1pp1_te", "tp1pp1_mcore020")),
        *(f"megatron/llama/{case}_torch" for case in ("tp1pp1", "tp2pp2", "tp1pp2vp2", "tp2pp1_te")),
        *(f"megatron/qwen2/{case}" for case in ("tp2pp2", "tp2pp2_te_torch")),
        *(f"megatron/qwen3/{case}" for case in ("tp2pp2", "tp1pp1_torch")),
        *(f"megatron/gpt2/{case}" for case in ("tp1pp1", "tp2pp2_torch")),
    ],
    "families": [
        *(f"megatron/{family}/*" for family in ("mixtral", "qwen3_moe", "deepseek_v3")),
        *(f"bridge/*/{part}" for part in ("hf/*.json", "hf/model.safetensors", "megatron.safetensors", "torch_dist")),
        "bridge/*/tp*/megatron_rank*.safetensors",
    ],
    "trtllm": [
        *(f"trtllm/_inputs/{name}" for name in ("llama_gqa", "llama_gqa_bf16", "llama_tied", "llama31", "mistral")),
        *(f"trtllm/_inputs/{name}" for name in ("qwen2", "qwen2_tied", "qwen3", "gpt2")),
        *(f"trtllm/trt_llama_gqa_{case}" for case in ("tp1_pp1", "tp2_pp1", "tp2_pp2", "tp8_pp1", "embtp0_tp2")),
        *(f"trtllm/trt_llama{case}" for case in ("_gqa_fp32_tp2", "_bf16_tp2", "_tied_tp1", "31_tp2")),
        *(f"trtllm/trt_{case}" for case in ("mistral_tp2", "qwen2_tp1_pp1", "qwen2_tp2_pp1", "qwen2_tied_tp2")),
        *(f"trtllm/trt_{case}" for case in ("qwen3_tp1_pp1", "qwen3_tp2_pp1", "qwen3_fp32_tp2")),
        *(f"trtllm/trt_{case}" for case in ("gpt2_tp1_pp1", "gpt2_tp2_pp1")),
        "trtllm/mo_llama_none_tp2",
    ],
    "quantized": [
        "trtllm/_inputs/llama_h128",
        *(f"trtllm/mo_llama_{case}" for case in ("fp8_tp1", "nvfp4_tp1", "fp8pcpt_tp2", "fp8_kvfp8_tp1")),
        "trtllm/_schemas",
    ],
}


@dataclass(frozen=True)
class MegatronCase:
    """A checkpoint that Megatron wrote. The paths are names for `golden`."""

    id: str  # "llama/tp2pp2"
    family: str  # a HuggingFace model_type
    dir: str  # holds latest_checkpointed_iteration.txt
    iter_dir: str  # holds .metadata and .distcp files, or mp_rank_* directories
    hf: str  # the HuggingFace model that it was filled from
    reference: (
        str  # safetensors with `input_ids` and `logits`: of hf, or for a trained one of Megatron after the training
    )
    layout: dict[str, int]  # keywords of registry.Parallel
    format: str  # "torch_dist" or "torch"
    dtype: str  # "float32" or "bfloat16"
    spec: str  # "local" or "te"
    optimizer: str | None  # the optimizer whose state it holds
    trained: bool  # trained for a step: its weights are not those of hf
    hf_expected: str | None  # the HuggingFace model that a trained one should become, where that was written
    grouped_gemm: bool
    padded_vocab: int
    true_vocab: int
    written_by: str

    def __str__(self) -> str:
        return self.id

    @property
    def has_optimizer(self) -> bool:
        return self.optimizer is not None

    @property
    def path(self) -> Path:
        return golden(self.dir)


@dataclass(frozen=True)
class BridgeCase:
    """A tiny model of one family, and what Megatron-Bridge made of it. `dir` is a name for `golden`.

    `dir` holds hf/, torch_dist/ without a common state, megatron.safetensors (the state dict at TP1) and, for each of
    `layouts`, megatron_rank{r}.safetensors of every rank.
    """

    id: str  # "DeepseekV3ForCausalLM__te"
    family: str  # a HuggingFace model_type
    dir: str
    spec: str  # "local" or "te"
    layouts: tuple[str, ...]  # "tp2_pp1_ep1"

    def __str__(self) -> str:
        return self.id

    @property
    def path(self) -> Path:
        return golden(self.dir)


@dataclass(frozen=True)
class TrtllmCase:
    """A checkpoint in TensorRT-LLM's format. The paths are names for `golden`."""

    id: str  # "trt_llama_gqa_tp2_pp1": trt_ by TensorRT-LLM's converter, mo_ by ModelOpt, meg_ by Megatron's exporter
    family: str  # a HuggingFace model_type, or of a meg_ case what the exporter calls the model
    architecture: str
    dir: str  # holds config.json and rank{N}.safetensors
    input: str  # the HuggingFace model, or of a meg_ case a safetensors file of Megatron's tensors
    tp: int
    pp: int
    dtype: str
    quant: str | None
    argv: str | None  # the converter's arguments
    trust: str
    note: str
    written_by: str

    def __str__(self) -> str:
        return self.id

    @property
    def path(self) -> Path:
        return golden(self.dir)


def golden(name: str) -> Path:
    """The file or directory of that name under a golden directory; skips the test where there is none."""
    name = name.strip("/")
    for archive, files in _manifest()["files"].items():
        if name in files or any(file.startswith(f"{name}/") for file in files):
            return _unpacked(archive) / name
    if (SHARED / name).exists():
        return SHARED / name
    pytest.skip(f"no golden {name}: not packed in {PACKED}, and not in {SHARED}")


@cache
def megatron_cases() -> tuple[MegatronCase, ...]:
    """Every Megatron golden that this machine has, by id."""
    cases = {entry["id"]: MegatronCase(**entry) for entry in _manifest()["megatron"]}
    if (SHARED / "megatron" / "MANIFEST.json").exists():
        cases |= {case.id: case for case in _shared_megatron()}
    return tuple(cases[key] for key in sorted(cases))


@cache
def bridge_cases() -> tuple[BridgeCase, ...]:
    """Every Megatron-Bridge golden that this machine has, by id."""
    entries = [{**entry, "layouts": tuple(entry["layouts"])} for entry in _manifest()["bridge"]]
    cases = {entry["id"]: BridgeCase(**entry) for entry in entries}
    if (SHARED / "bridge").exists():
        cases |= {case.id: case for case in _shared_bridge()}
    return tuple(cases[key] for key in sorted(cases))


@cache
def trtllm_cases() -> tuple[TrtllmCase, ...]:
    """Every TensorRT-LLM golden that this machine has, by id."""
    cases = {entry["id"]: TrtllmCase(**entry) for entry in _manifest()["trtllm"]}
    if (SHARED / "trtllm" / "INDEX.json").exists():
        cases |= {case.id: case for case in _shared_trtllm()}
    return tuple(cases[key] for key in sorted(cases))


def packed(kind: str) -> list[dict[str, Any]]:
    """The entries of the goldens of one kind ("megatron", "bridge", "trtllm") that lie in this repository."""
    found: list[dict[str, Any]] = _manifest()[kind]
    return found


@cache
def _manifest() -> dict[str, Any]:
    manifest: dict[str, Any] = _json(PACKED / "MANIFEST.json")
    return manifest


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _shared_megatron() -> Iterable[MegatronCase]:
    for entry in _json(SHARED / "megatron" / "MANIFEST.json")["cases"]:
        layout = {"vpp" if axis == "vp" else axis: size for axis, size in entry["layout"].items() if size is not None}
        yield MegatronCase(
            id=entry["case"],
            family=entry["arch"],
            dir=f"megatron/{entry['path']}",
            iter_dir=f"megatron/{entry['iter_dir']}",
            hf=f"megatron/{entry['hf_dir']}",
            reference=f"megatron/{entry['post_train_logits'] or entry['reference_logits']}",
            layout=layout,
            format=entry["format"],
            dtype=entry["dtype"],
            spec=entry["spec"].split()[0],
            optimizer=entry["optimizer"],
            trained=entry["weights"].startswith("after"),
            hf_expected=f"megatron/{entry['hf_expected']}" if entry["hf_expected"] else None,
            grouped_gemm=entry["grouped_gemm"],
            padded_vocab=entry["padded_vocab_size"],
            true_vocab=entry["true_vocab_size"],
            written_by=entry["written_by"],
        )


def _shared_bridge() -> Iterable[BridgeCase]:
    for config in sorted((SHARED / "bridge").glob("*/hf/config.json")):
        folder = config.parents[1]
        yield BridgeCase(
            id=folder.name,
            family=_json(config)["model_type"],
            dir=f"bridge/{folder.name}",
            spec="te" if folder.name.endswith("__te") else "local",
            layouts=tuple(sorted(path.parent.name for path in folder.glob("tp*/megatron_rank0.safetensors"))),
        )


def _shared_trtllm() -> Iterable[TrtllmCase]:
    for entry in _json(SHARED / "trtllm" / "INDEX.json"):
        made = _json(SHARED / "trtllm" / entry["case"] / "manifest.json")
        config = SHARED / "trtllm" / entry["input"] / "config.json"
        yield TrtllmCase(
            id=entry["case"],
            family=_json(config)["model_type"] if config.exists() else made["model_type"],
            architecture=entry["arch"],
            dir=f"trtllm/{entry['case']}/trtllm",
            input=f"trtllm/{entry['input']}",
            tp=entry["tp"],
            pp=entry["pp"],
            dtype=entry["dtype"],
            quant=entry["quant"],
            argv=made.get("argv"),
            trust=entry["trust"],
            note=made.get("note", ""),
            written_by=made["producer"],
        )


@cache
def _unpacked(archive: str) -> Path:
    packed = (PACKED / f"{archive}.tar.xz").read_bytes()
    target = PACKED / "unpacked" / f"{archive}-{hashlib.sha256(packed).hexdigest()[:12]}"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        expected = _manifest()["files"][archive]
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            for member in tar:
                source = tar.extractfile(member)
                data = source.read() if source else b""
                if hashlib.sha256(data).hexdigest() != expected[member.name]["sha256"]:
                    raise ValueError(f"{archive}.tar.xz: {member.name} is not what MANIFEST.json says")
                path = Path(scratch, "files", member.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                path.chmod(0o644)
        if missing := [name for name in expected if not Path(scratch, "files", name).exists()]:
            raise ValueError(f"{archive}.tar.xz lacks {missing}")
        try:
            Path(scratch, "files").rename(target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    return target


def _pack() -> None:
    files: dict[str, dict[str, Any]] = {}
    for archive, names in CONTENTS.items():
        files[archive] = {}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for path in sorted({path for name in names for path in _files(name)}):
                name, data = path.relative_to(SHARED).as_posix(), path.read_bytes()
                files[archive][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        packed = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
        (PACKED / f"{archive}.tar.xz").write_bytes(packed)
        print(f"{archive}: {len(files[archive])} files, {len(buffer.getvalue())} bytes, packed {len(packed)}")
    held = {parent.as_posix() for names in files.values() for name in names for parent in Path(name).parents}
    manifest = {
        "source": "shared/golden of the project, file by file under the same names",
        "megatron": [asdict(case) for case in _shared_megatron() if case.dir in held],
        "bridge": [asdict(case) for case in _shared_bridge() if case.dir in held],
        "trtllm": [asdict(case) for case in _shared_trtllm() if case.dir in held],
        "files": files,
    }
    (PACKED / "MANIFEST.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    (PACKED / ".gitignore").write_text("unpacked/\n")
    shutil.rmtree(PACKED / "unpacked", ignore_errors=True)


def _files(pattern: str) -> Iterator[Path]:
    for path in SHARED.glob(pattern):
        yield from [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())


if __name__ == "__main__":
    _pack()
