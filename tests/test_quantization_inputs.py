"""Where the ranges of a quantised export come from besides a calibration: training, and what is quantised already."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import registry
from tests.goldens import golden
from tests.test_quantization import MODEL, ranks, same

#: Case -> (the HuggingFace model, its layers, ranks of the export).
TRAINED = {"meg_llama_fp8_tp1": (MODEL, 2, 1), "meg_gpt2_fp8_tp2": ("trtllm/_inputs/gpt2", 4, 2)}
FP8 = {"quantization": "FP8", "kv_cache_quantization": "FP8"}


def extra_state(numbers: dict[str, list[float]], generation: int) -> torch.Tensor | io.BytesIO:
    """The state of one module as Transformer-Engine writes it: version 1 into a BytesIO, later ones into a tensor.

    Source: transformer_engine/pytorch/module/base.py, get_extra_state, of versions 1.0 and 2.0.
    """
    state: dict[str, Any] = {
        "scale_fwd": torch.tensor(numbers["scale_fwd"]), "amax_history_fwd": torch.zeros(16, 3),
        "scale_bwd": torch.ones(2), "amax_history_bwd": torch.zeros(16, 2), "extra_fp8_variables": {"num_gemms": 1},
    }  # fmt: skip
    if generation == 1:
        kept = io.BytesIO()
        torch.save(state | {"scale_inv_fwd": torch.tensor(numbers["scale_inv_fwd"])}, kept)
        kept.seek(0)
        return kept
    return torch.frombuffer(bytearray(pickle.dumps(state | {"recipe": None})), dtype=torch.uint8)


def numbers(case: str) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = json.loads(golden(f"trtllm/{case}/manifest.json").read_text())[
        "fp8_extra_state"
    ]
    return found


def compare(case: str, path: Path, tp: int) -> None:
    for ours, theirs in zip(ranks(path), ranks(golden(f"trtllm/{case}/trtllm")), strict=True):
        assert ours.keys() == theirs.keys()
        # Megatron's exporter cuts an output layer that no loader takes where the vocabulary does not divide.
        odd = {"lm_head.weight"} if tp > 1 else set()
        assert [name for name in ours if name not in odd and not same(ours[name], theirs[name])] == []


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("case", TRAINED)
def test_ranges_of_training_in_a_legacy_checkpoint(
    case: str, layout: dict[str, int], generation: int, tmp_path: Path
) -> None:
    source, layers, tp = TRAINED[case]
    registry.convert(
        golden(source), tmp_path / "legacy", to="megatron-legacy", dtype="bfloat16",
        parallel=registry.Parallel(**layout), options={"transformer_impl": "transformer_engine"},
    )  # fmt: skip
    each = layers // layout.get("pp", 1)
    for file in (tmp_path / "legacy").rglob("model_optim_rng.pt"):
        stage = int(file.parent.name.split("_")[3]) if "pp" in layout else 0
        state = torch.load(file, weights_only=False)
        for module, kept in numbers(case).items():
            layer = int(module.split(".")[2])
            if layer // each == stage:
                local = module.replace(f"layers.{layer}.", f"layers.{layer - stage * each}.")
                state["model"][f"{local}._extra_state"] = extra_state(kept, generation)
        torch.save(state, file)
    registry.convert(tmp_path / "legacy", tmp_path / "out", to="trtllm", parallel=registry.Parallel(tp=tp), options=FP8)
    compare(case, tmp_path / "out", tp)


def with_objects(checkpoint: Path, target: Path, own: dict[str, Any]) -> None:
    """A distributed checkpoint with further objects in it, written by torch."""
    saved = next(checkpoint.glob("*/.metadata")).parent
    reader = dcp.FileSystemReader(saved)
    held = reader.read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in held.items() if hasattr(m, "size")}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({**tensors, **own}, checkpoint_id=target, no_dist=True, planner=planner)
    for file in saved.iterdir():
        if file.is_file() and not (target / file.name).exists() and file.suffix != ".distcp":
            shutil.copy(file, target / file.name)


@pytest.mark.parametrize("generation", [1, 2])
def test_ranges_of_training_in_a_distributed_checkpoint(generation: int, tmp_path: Path) -> None:
    case = "meg_llama_fp8_tp1"
    source, layers, tp = TRAINED[case]
    registry.convert(golden(source), tmp_path / "in", to="megatron", dtype="bfloat16")
    own = {}
    for module, kept in numbers(case).items():
        layer = int(module.split(".")[2])
        name = f"{module.replace(f'layers.{layer}.', 'layers.')}._extra_state/shard_{layer}_{layers}"
        own[name] = [extra_state(kept, generation)]  # as megatron-core wraps what is no tensor
    with_objects(tmp_path / "in", tmp_path / "new", own)
    registry.convert(tmp_path / "new", tmp_path / "out", to="trtllm", options=FP8, config=golden(source))
    compare(case, tmp_path / "out", tp)


MIXTRAL, EXPERTS = "trtllm/_inputs/mixtral", 4


def expert_numbers(layer: int, expert: int, part: int) -> tuple[float, float]:
    """Made-up multipliers of one expert's input and weights, such as Transformer-Engine has (powers of two or not)."""
    return 3.0 + layer + 0.25 * expert + part, 100.0 + 16 * layer + expert + 7 * part


def experts_state(each: list[tuple[float, float]], generation: int) -> torch.Tensor | io.BytesIO:
    """One state of several experts: scale_fwd is (input, weights, output) x expert, laid out in a row.

    Source: megatron/core/extensions/transformer_engine.py, TEGroupedLinear._split_extra_state.
    """
    table = torch.tensor([[a, w, 1.0] for a, w in each]).t().contiguous()
    return extra_state({"scale_fwd": table.reshape(-1).tolist(), "scale_inv_fwd": (1 / table).reshape(-1).tolist()},
                       generation)  # fmt: skip


def dense_states(layers: range, first: int, generation: int) -> dict[str, Any]:
    """States of the attention layers of one stage."""
    one = extra_state({"scale_fwd": [2.0, 50.0, 1.0], "scale_inv_fwd": [0.5, 0.02, 1.0]}, generation)
    return {f"decoder.layers.{i - first}.self_attention.{name}._extra_state": one
            for i in layers for name in ("linear_qkv", "linear_proj")}  # fmt: skip


def check_experts(path: Path) -> None:
    """Every expert's weights have its own scale, and the largest input's is theirs together. float32, as TE divides."""
    plain = registry.open(golden(MIXTRAL)).view("huggingface")
    (stored,) = ranks(path)
    for layer in range(2):
        for part, (name, sources) in enumerate((("fc", ("w3", "w1")), ("proj", ("w2",)))):
            module = f"transformer.layers.{layer}.mlp.{name}"
            numbers = [expert_numbers(layer, e, part) for e in range(EXPERTS)]
            scales = torch.tensor([[w] for _, w in numbers])
            assert same(stored[f"{module}.weights_scaling_factor"], 1 / scales)
            assert same(stored[f"{module}.activation_scaling_factor"], (1 / torch.tensor([min(a for a, _ in numbers)])))
            for e in range(EXPERTS):
                experts = f"model.layers.{layer}.block_sparse_moe.experts.{e}"
                whole = torch.cat([plain[f"{experts}.{w}.weight"].bfloat16().float() for w in sources])
                expected = (whole * scales[e]).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert same(stored[f"{module}.weight"][e], expected), (module, e)


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"pp": 2, "ep": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=str)
@pytest.mark.parametrize("modules", ["grouped", "sequential"])
def test_ranges_of_experts_in_a_legacy_checkpoint(
    modules: str, layout: dict[str, int], generation: int, tmp_path: Path
) -> None:
    parallel = registry.Parallel(**layout)
    registry.convert(
        golden(MIXTRAL), tmp_path / "legacy", to="megatron-legacy", dtype="bfloat16", parallel=parallel,
        options={"transformer_impl": "transformer_engine", "expert_modules": modules},
    )  # fmt: skip
    each, count = 2 // parallel.pp, EXPERTS // parallel.ep
    for file in (tmp_path / "legacy").rglob("model_optim_rng.pt"):
        _, _, _, *rest = file.parent.name.split("_")
        stage = int(rest[0]) if parallel.pp > 1 else 0
        first_expert = int(rest[-1]) * count if parallel.ep > 1 else 0
        state = torch.load(file, weights_only=False)
        layers, own = range(stage * each, (stage + 1) * each), {}
        for layer in layers:
            for part, linear in enumerate(("linear_fc1", "linear_fc2")):
                head = f"decoder.layers.{layer - stage * each}.mlp.experts"
                numbers = [expert_numbers(layer, first_expert + e, part) for e in range(count)]
                if modules == "grouped":
                    own[f"{head}.{linear}._extra_state"] = experts_state(numbers, generation)
                else:
                    for e, one in enumerate(numbers):
                        own[f"{head}.local_experts.{e}.{linear}._extra_state"] = experts_state([one], generation)
        state["model"] |= dense_states(layers, stage * each, generation) | own
        torch.save(state, file)
    registry.convert(tmp_path / "legacy", tmp_path / "out", to="trtllm", options=FP8)
    check_experts(tmp_path / "out")


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("spelling", ["stacked", "per layer", "one by one"])
def test_ranges_of_experts_in_a_distributed_checkpoint(spelling: str, generation: int, tmp_path: Path) -> None:
    """Grouped and sequential experts are saved under the same names.

    Source: shared reference megatron.md B3.1; TEGroupedLinear._sharded_state_dict_grouped.
    """
    layers = "stacked" if spelling == "stacked" else "per_layer"
    registry.convert(golden(MIXTRAL), tmp_path / "in", to="megatron", dtype="bfloat16", options={"layers": layers})
    own: dict[str, Any] = {}
    for layer in range(2):
        for linear in ("linear_qkv", "linear_proj"):
            (state,) = {id(s): s for s in dense_states(range(layer, layer + 1), 0, generation).values()}.values()
            name, at = ("decoder.layers", f"{layer}_2") if layers == "stacked" else (f"decoder.layers.{layer}", "0_1")
            own[f"{name}.self_attention.{linear}._extra_state/shard_{at}"] = [state]
        for part, linear in enumerate(("linear_fc1", "linear_fc2")):
            for e in range(EXPERTS):
                module, at = {
                    "stacked": (f"decoder.layers.mlp.experts.experts.{linear}", f"{layer}.{e}_2.{EXPERTS}"),
                    "per layer": (f"decoder.layers.{layer}.mlp.experts.experts.{linear}", f"{e}_{EXPERTS}"),
                    "one by one": (f"decoder.layers.{layer}.mlp.experts.experts.{e}.{linear}", "0_1"),
                }[spelling]
                name = f"{module}._extra_state/shard_{at}"
                own[name] = [experts_state([expert_numbers(layer, e, part)], generation)]
    with_objects(tmp_path / "in", tmp_path / "new", own)
    registry.convert(tmp_path / "new", tmp_path / "out", to="trtllm", options=FP8, config=golden(MIXTRAL))
    check_experts(tmp_path / "out")


def test_experts_of_which_one_has_no_state(tmp_path: Path) -> None:
    """Its range is missing, as a calibration's would be: the error names its module."""
    registry.convert(
        golden(MIXTRAL), tmp_path / "legacy", to="megatron-legacy", dtype="bfloat16",
        options={"transformer_impl": "transformer_engine", "expert_modules": "sequential"},
    )  # fmt: skip
    (file,) = (tmp_path / "legacy").rglob("model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    state["model"] |= dense_states(range(2), 0, 2)
    torch.save(state, file)
    with pytest.raises(registry.CheckpointError, match=r"experts\.0\.w3\.input_quantizer\._amax.*not there"):
        registry.convert(tmp_path / "legacy", tmp_path / "out", to="trtllm", options=FP8)
    assert not (tmp_path / "out").exists()


def test_a_state_of_training_that_is_hostile(tmp_path: Path) -> None:
    registry.convert(
        golden(MODEL), tmp_path / "in", to="megatron-legacy", dtype="bfloat16",
        options={"transformer_impl": "transformer_engine"},
    )  # fmt: skip
    file = next((tmp_path / "in").rglob("model_optim_rng.pt"))
    state = torch.load(file, weights_only=False)

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harmed",)

    name = "decoder.layers.0.self_attention.linear_qkv._extra_state"
    for content, said in ((pickle.dumps(Hostile()), "not allowed|allow"), (b"\x80\x04K", "corrupt|pickle")):
        state["model"][name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        torch.save(state, file)
        with pytest.raises(registry.CheckpointError, match=said):
            registry.convert(tmp_path / "in", tmp_path / "out", to="trtllm", options=FP8)
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "out").exists()


PARTS = {
    "self_attn.q_proj": ("attention.qkv", 0, 128), "self_attn.k_proj": ("attention.qkv", 128, 192),
    "self_attn.v_proj": ("attention.qkv", 192, 256), "self_attn.o_proj": ("attention.dense", 0, 128),
    "mlp.gate_proj": ("mlp.fc", 0, 256), "mlp.up_proj": ("mlp.gate", 0, 256), "mlp.down_proj": ("mlp.proj", 0, 128),
}  # fmt: skip


def exported(target: Path, case: str, method: str) -> None:
    """A HuggingFace checkpoint of the same quantised weights that a golden has, as ModelOpt lays it out."""
    stored = load_file(golden(f"trtllm/{case}/trtllm") / "rank0.safetensors")
    tensors = load_file(golden(MODEL) / "model.safetensors")
    names = {"weights_scaling_factor": "weight_scale", "weights_scaling_factor_2": "weight_scale_2"}
    if method == "modelopt":
        names["activation_scaling_factor"] = "input_scale"
    for layer in range(2):
        for part, (module, low, high) in PARTS.items():
            here, there = f"model.layers.{layer}.{part}", f"transformer.layers.{layer}.{module}"
            tensors[f"{here}.weight"] = stored[f"{there}.weight"][low:high].clone()
            for name, own in names.items():
                if f"{there}.{name}" in stored:
                    scale = stored[f"{there}.{name}"]
                    tensors[f"{here}.{own}"] = (scale[low:high] if scale.dim() > 1 else scale.reshape(())).clone()
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((golden(MODEL) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))


@pytest.mark.parametrize(("case", "scheme"), [("mo_llama_fp8_tp1", "FP8"), ("mo_llama_nvfp4_tp1", "NVFP4")])
def test_what_is_quantised_already_is_passed_through(case: str, scheme: str, tmp_path: Path) -> None:
    """The same values and scales as if it had been exported at once: nothing is lost a second time."""
    exported(tmp_path / "in", case, "modelopt")
    registry.convert(
        tmp_path / "in", tmp_path / "out", to="trtllm",
        options={"quantization": scheme, "use_parallel_embedding": True},
    )  # fmt: skip
    (ours,), (theirs,) = ranks(tmp_path / "out"), ranks(golden(f"trtllm/{case}/trtllm"))
    assert ours.keys() == theirs.keys()
    off = [name for name in ours if not same(ours[name], theirs[name])]
    if scheme == "NVFP4":  # of FP4's two zeros the negative one is lost
        for name in [n for n in off if n.endswith(".weight")]:
            both = [torch.stack([t & 15, t >> 4]).masked_fill(torch.stack([t & 15, t >> 4]) == 8, 0)
                    for t in (ours[name], theirs[name])]  # fmt: skip
            assert torch.equal(*both), name
            off.remove(name)
    assert off == []


@pytest.mark.parametrize(
    ("case", "method"),
    [("mo_llama_fp8_tp1", "compressed-tensors"), ("mo_llama_fp8_tp1", "modelopt"), ("mo_llama_nvfp4_tp1", "modelopt")],
)
def test_what_is_quantised_already_is_decoded(case: str, method: str, tmp_path: Path) -> None:
    """The same weights as the golden of the same numbers gives, read from TensorRT-LLM's side."""
    exported(tmp_path / "in", case, method)
    registry.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    golden_case = golden(f"trtllm/{case}/trtllm")
    registry.convert(golden_case, tmp_path / "other", to="huggingface", config=golden(MODEL))
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "other"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_scale_for_each_row_is_decoded(tmp_path: Path) -> None:
    """compressed-tensors' strategy `channel`: float32(value) * float32(scale), rounded once."""
    tensors = load_file(golden(MODEL) / "model.safetensors")
    expected = dict(tensors)
    for name in [n for n in tensors if "proj" in n]:
        weight = tensors[name].float()
        scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
        tensors[name] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
        expected[name] = (tensors[name].float() * scale.float()).bfloat16()
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    config = json.loads((golden(MODEL) / "config.json").read_text())
    said = config | {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "in/config.json").write_text(json.dumps(said))
    registry.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not torch.equal(ours[name], expected[name])] == []
    with pytest.raises(registry.CheckpointError, match="no calibration is given"):  # there are no ranges of inputs
        registry.convert(tmp_path / "in", tmp_path / "trt", to="trtllm", options={"quantization": "FP8"})


def test_a_scale_of_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "in", "mo_llama_fp8_tp1", "modelopt")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(7)
    save_file(tensors, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(registry.CheckpointError, match="does not fit"):
        registry.convert(tmp_path / "in", tmp_path / "out", to="huggingface")
