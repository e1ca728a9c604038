"""What `make demo` runs: a small real Llama through every format and back, checked at each step.

HuggingFace -> Megatron (TP2 PP2) -> HuggingFace -> TensorRT-LLM (TP2). No network, no GPU; what it writes goes to a
temporary directory. Exits with 1 where anything differs.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file

import registry

LLAMA = {
    "vocab_size": 4000,  # no multiple of 256, so Megatron pads it
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDTH = 46
problems: list[str] = []


def row(step: str, files: int, size: int, seconds: float, speed: str = "") -> None:
    """Print one line of the table."""
    print(f"{step:<{WIDTH}}{files:>6}{size / 1e6:>9.1f} MB{seconds:>8.2f} s{speed:>12}".rstrip(), flush=True)


def check(what: str, right: bool, found: str) -> None:
    """Print the outcome of one check, and remember a wrong one."""
    print(f"  {'ok   ' if right else 'WRONG'} {what}: {found}", flush=True)
    if not right:
        problems.append(what)


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below a directory, by its path in it."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def build(folder: Path) -> None:
    """Save a Llama with random weights, norms included, so that a tensor in the wrong place changes the logits."""
    start = time.perf_counter()
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="40MB")
    made = files_of(folder)
    size = sum(path.stat().st_size for path in made.values())
    parameters = f"{model.num_parameters() / 1e6:.1f} M parameters"
    row(f"build a Llama, {parameters}, bfloat16", len(made), size, time.perf_counter() - start)


def convert(step: str, source: Path, target: Path, to: str, **parallel: int) -> None:
    """Convert, print what it took, and compare the two checkpoints tensor by tensor."""
    report = registry.convert(source, target, to=to, parallel=registry.Parallel(**parallel))
    row(step, report.files, report.nbytes, report.seconds, f"{report.nbytes / report.seconds / 1e9:.2f} GB/s")
    start = time.perf_counter()
    outcome = registry.verify(source, target)
    took = time.perf_counter() - start
    check("verify", bool(outcome), f"{outcome} ({took:.2f} s)")


def logits(folder: Path) -> torch.Tensor:
    """What the model at `folder` answers to a fixed input, as transformers loads and runs it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.randint(LLAMA["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(ids).logits.float()
    return found


def compare_files(original: Path, returned: Path) -> None:
    """Check that every file of the original has come back with the same bytes."""
    digests = [
        {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files_of(folder).items()}
        for folder in (original, returned)
    ]
    different = sorted(name for name in digests[0] if digests[0][name] != digests[1].get(name))
    found = f"{len(digests[0]) - len(different)} of {len(digests[0])} the same"
    check("sha256 of the files", not different, found + "".join(f", {name} differs" for name in different))


def compare_logits(original: Path, returned: Path) -> None:
    """Check that transformers loads the model that came back and computes the same with it."""
    before, after = logits(original), logits(returned)
    difference = (before - after).abs().max().item()
    usable = bool(before.isfinite().all()) and before.std().item() > 0
    check("logits", usable and difference == 0.0, f"{tuple(after.shape)}, largest difference {difference}")


def compare_ranks(original: Path, ranks: Path) -> None:
    """Check the rank files that TensorRT-LLM would load against the HuggingFace model, without our own library."""
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(original.glob("*.safetensors")):
        whole |= load_file(path)
    parts = [load_file(ranks / f"rank{rank}.safetensors") for rank in range(2)]
    head = LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    rows = (LLAMA["num_attention_heads"] + 2 * LLAMA["num_key_value_heads"]) * head // 2
    shapes = {
        "transformer.layers.0.attention.qkv.weight": (rows, LLAMA["hidden_size"]),
        "transformer.layers.0.attention.dense.weight": (LLAMA["hidden_size"], LLAMA["hidden_size"] // 2),
        "transformer.layers.0.mlp.fc.weight": (LLAMA["intermediate_size"] // 2, LLAMA["hidden_size"]),
        "transformer.layers.0.mlp.proj.weight": (LLAMA["hidden_size"], LLAMA["intermediate_size"] // 2),
        "transformer.vocab_embedding.weight": (LLAMA["vocab_size"], LLAMA["hidden_size"]),
        "lm_head.weight": (LLAMA["vocab_size"] // 2, LLAMA["hidden_size"]),
    }
    wrong = [name for name, shape in shapes.items() for part in parts if tuple(part[name].shape) != shape]
    found = f"{len(parts[0])} tensors each" + "".join(f", {name} is of another shape" for name in wrong)
    check("rank files", not wrong, found)
    same = True
    for layer in range(LLAMA["num_hidden_layers"]):
        ours, theirs = f"transformer.layers.{layer}.", f"model.layers.{layer}."
        projections = [whole[f"{theirs}self_attn.{part}_proj.weight"].chunk(2) for part in "qkv"]
        for rank, part in enumerate(parts):
            fused = torch.cat([projection[rank] for projection in projections])
            same &= torch.equal(part[ours + "attention.qkv.weight"], fused)
        for name, other, dim in (("mlp.fc", "gate_proj", 0), ("mlp.gate", "up_proj", 0), ("mlp.proj", "down_proj", 1)):
            joined = torch.cat([part[f"{ours}{name}.weight"] for part in parts], dim)
            same &= torch.equal(joined, whole[f"{theirs}mlp.{other}.weight"])
    check("their values", same, "fused QKV and MLP of each layer, cut by hand" if same else "not those of the original")


def main() -> int:
    """Run the demo. Returns the exit status."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="registry-demo-") as folder:
        names = ("original", "megatron-tp2-pp2", "returned", "trtllm-tp2")
        original, megatron, returned, trtllm = (Path(folder, name) for name in names)
        print(f"{'':<{WIDTH}}{'files':>6}{'size':>12}{'time':>10}{'speed':>12}")
        build(original)
        convert("HuggingFace -> Megatron TP2 PP2", original, megatron, "megatron", tp=2, pp=2)
        convert("Megatron TP2 PP2 -> HuggingFace", megatron, returned, "huggingface")
        compare_files(original, returned)
        compare_logits(original, returned)
        convert("HuggingFace -> TensorRT-LLM TP2", returned, trtllm, "trtllm", tp=2)
        compare_ranks(original, trtllm)
    print(f"{'FAILED: ' + ', '.join(problems) if problems else 'all the same'} ({time.perf_counter() - start:.1f} s)")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
