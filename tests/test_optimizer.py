"""Optimizer state of Megatron's checkpoints, moved to other layouts: goldens, the flat form built by other code, and
what is refused. tests/test_megatron_optimizer.py has megatron-core itself as the judge."""

from __future__ import annotations

import argparse
import itertools
import math
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter, metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import registry
from registry import CheckpointError, MappingError, Parallel
from registry.boxes import Fragment, contiguous, stretch
from tests.goldens import golden
from tests.test_golden_megatron import global_tensors

FULL = "megatron/llama/tp1pp1dp2_bf16_distfull"
FORMS = ["distdp", "distfull", "distfull_torch"]
LAYOUTS = [Parallel(), Parallel(tp=2, pp=2), Parallel(tp=4)]
STEP = "iter_0000010"
ROWS = 131  # of the vocabulary; the rest is padding
SIXTEEN = {"make_vocab_size_divisible_by": 16}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    padded = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: t[:ROWS] if name.endswith(padded) else t for name, t in global_tensors(folder).items()}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def to_megatron(source: Path, target: Path, parallel: Parallel | None = None, **options: Any) -> registry.Report:
    return registry.convert(
        source, target, to="megatron", architecture="llama", parallel=parallel, options={**SIXTEEN, **options}
    )


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_golden_of_the_reshardable_one(form: str, parallel: Parallel, tmp_path: Path) -> None:
    """Megatron saved one training in all three."""
    report = to_megatron(golden(f"megatron/llama/tp1pp1dp2_bf16_{form}"), tmp_path / "out", parallel)
    expected = tensors_of(golden(FULL) / STEP)
    assert sum(name.startswith("optimizer.state.") for name in expected) == 27
    equal(tensors_of(tmp_path / "out" / STEP), expected)
    assert not [name for name in report.left_out if "optimizer" in name]


def test_onwards_through_other_layouts(tmp_path: Path) -> None:
    source = golden("megatron/llama/tp1pp1dp2_bf16_distdp")
    for i, parallel in enumerate([Parallel(tp=2, pp=2), Parallel(tp=4), Parallel(pp=(1, 3)), Parallel()]):
        to_megatron(source, tmp_path / str(i), parallel)
        source = tmp_path / str(i)
    equal(tensors_of(source / STEP), tensors_of(golden(FULL) / STEP))


@pytest.mark.parametrize("form", FORMS)
def test_the_step_and_the_schedule_travel_along(form: str, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")  # whose classes are in the golden's arguments
    to_megatron(golden(f"megatron/llama/tp1pp1dp2_bf16_{form}"), tmp_path / "out", Parallel(tp=2))
    found = torch.load(tmp_path / "out" / STEP / "common.pt", weights_only=False)
    expected = torch.load(golden(FULL) / STEP / "common.pt", weights_only=False)
    for key in ("opt_param_scheduler", "iteration", "num_floating_point_operations_so_far"):
        assert found[key] == expected[key]
    groups = [state["optimizer"]["optimizer"]["param_groups"] for state in (found, expected)]
    assert len(groups[0]) == len(groups[1]) > 0
    for ours, theirs in zip(*groups, strict=True):
        assert {key: value for key, value in ours.items() if key != "params"} == {
            key: value for key, value in theirs.items() if key != "params"
        }
    assert found["optimizer"]["param_state_sharding_type"] == "fully_reshardable"


def test_an_optimizer_without_data_parallel_shards(tmp_path: Path) -> None:
    """What Float16Optimizer and FP32Optimizer save has other names and stays what it is."""
    source = golden("megatron/llama/tp1pp1_optim")
    expected = next(path for path in source.iterdir() if (path / ".metadata").exists())
    to_megatron(source, tmp_path / "out", Parallel(tp=2, pp=2))
    equal(tensors_of(tmp_path / "out" / expected.name), tensors_of(expected))


@pytest.mark.parametrize("form", FORMS)
def test_without_the_optimizer_the_weights_are_the_same(form: str, tmp_path: Path) -> None:
    source = golden(f"megatron/llama/tp1pp1dp2_bf16_{form}")
    report = to_megatron(source, tmp_path / "out", Parallel(tp=2), optimizer="none")
    expected = tensors_of(golden(FULL) / STEP)
    equal(
        tensors_of(tmp_path / "out" / STEP),
        {name: t for name, t in expected.items() if not name.startswith("optimizer.")},
    )
    assert any("optimizer" in reason for reason in report.left_out.values())


@pytest.mark.parametrize("form", FORMS)
def test_huggingface_has_no_place_for_it_and_the_report_says_so(form: str, tmp_path: Path) -> None:
    source = golden(f"megatron/llama/tp1pp1dp2_bf16_{form}")
    report = registry.convert(source, tmp_path / "hf", to="huggingface", architecture="llama")
    assert any("optimizer state is not part of the model's weights" in why for why in report.left_out.values())
    to_megatron(source, tmp_path / "bare", optimizer="none")
    registry.convert(tmp_path / "bare", tmp_path / "again", to="huggingface", architecture="llama")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hf", "again")]
    assert files[0] == files[1]


# The stretch of a box.


@given(st.data())
@settings(max_examples=300)
def test_a_stretch_is_what_numpy_says(data: st.DataObject) -> None:
    """A fragment in a row-major box, and a stretch of that box: every element is in the parts where it lies."""
    rank = data.draw(st.integers(1, 4))
    box = tuple(data.draw(st.integers(1, 5)) for _ in range(rank))
    first = tuple(data.draw(st.integers(0, n - 1)) for n in box)
    size = tuple(data.draw(st.integers(1, n - f)) for n, f in zip(box, first, strict=True))
    low = tuple(data.draw(st.integers(0, 9)) for _ in box)
    begin = data.draw(st.integers(0, math.prod(box) - 1))
    count = data.draw(st.integers(1, math.prod(box) - begin))
    strides = contiguous(box)
    offset = sum(f * s for f, s in zip(first, strides, strict=True))
    parts = stretch(Fragment("t", tuple("abcd"[:rank]), low, size, strides, offset), begin, count)
    # which logical element lies at each place of the stretch
    held = np.full(box, -1)
    held[tuple(slice(f, f + n) for f, n in zip(first, size, strict=True))] = np.arange(math.prod(size)).reshape(size)
    expected = held.reshape(-1)[begin : begin + count]
    found = np.full(count, -1)
    for part in parts:
        for index in np.ndindex(*part.size):
            at = part.offset + sum(i * s for i, s in zip(index, part.stride, strict=True))
            logical = tuple(p + i - lo for p, i, lo in zip(part.lo, index, low, strict=True))
            assert found[at] == -1
            found[at] = np.ravel_multi_index(logical, size)
    assert np.array_equal(found, expected)
    assert len(parts) <= 2 * rank


# The flat form, by code that knows only what the reference says of it.


def test_the_goldens_buffer_is_as_the_reference_says(tmp_path: Path) -> None:
    """So that the layout below is Megatron's: rebuilt from the reshardable golden, it is the flat golden's numbers."""
    full = global_tensors(golden(FULL) / STEP)
    flat = global_tensors(golden("megatron/llama/tp1pp1dp2_bf16_distdp") / STEP)
    buffer = next(name for name in flat if name.endswith("exp_avg"))
    assert [name for name in flat if name.endswith("exp_avg")] == [buffer]
    model = {n.removeprefix("optimizer.state.exp_avg."): t for n, t in full.items() if ".exp_avg." in n}
    places = [*row_of(made_order(model))]
    for local, start, stop in places:
        assert torch.equal(flat[buffer][start:stop], local(model).reshape(-1))
    assert places[-1][2] == len(flat[buffer])


def made_order(model: dict[str, torch.Tensor]) -> list[Any]:
    """Every parameter of one rank in the order in which local layers make them, as a function of the global tensors."""
    layers = model["decoder.layers.mlp.linear_fc2.weight"].shape[0]
    within = ["self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_proj.weight"]
    within += ["self_attention.linear_qkv.weight", "mlp.linear_fc1.layer_norm_weight"]
    within += ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]

    def whole(name: str) -> Any:
        return lambda tensors: tensors[name], math.prod(model[name].shape)

    def layer(name: str, i: int) -> Any:
        return lambda tensors: tensors[name][i], math.prod(model[name].shape[1:])

    made = [whole("embedding.word_embeddings.weight")]
    made += [layer(f"decoder.layers.{name}", i) for i in range(layers) for name in within]
    return [*made, whole("decoder.final_layernorm.weight"), whole("output_layer.weight")]


def row_of(made: list[Any]) -> Any:
    """(parameter, start, stop): last one first, each from a multiple of 64 on."""
    at = 0
    for local, size in reversed(made):
        start = -(-at // 64) * 64
        at = start + size
        yield local, start, at


@st.composite
def flat_runs(draw: Any) -> dict[str, Any]:
    tp = draw(st.sampled_from([1, 2]))
    pp = draw(st.sampled_from([1, 2]))
    return {
        "tp": tp,
        "pp": pp,
        "vpp": draw(st.sampled_from([1, 2])) if pp == 2 else 1,
        "hidden": 4 * draw(st.integers(1, 5)),
        "ffn": 2 * draw(st.integers(1, 9)),
        "vocab": tp * 16 * draw(st.integers(1, 2)),
        "cuts": draw(st.lists(st.integers(1, 4000), max_size=6)),  # where data parallel ranks and padding cut a row
        "bucket": draw(st.sampled_from([10**9, 200, 1000, 3000])),
        "seed": draw(st.integers(0, 99)),
    }


LAYERS, HEADS, GROUPS = 4, 4, 2


def rank_parameters(run: dict[str, Any], tp: int, layers: range, first: bool, last: bool) -> list[tuple[str, Any]]:
    """The parameters of one model chunk in the order of making: (name, cut of the global tensor)."""
    n = run["tp"]

    def rows(name: str) -> Any:
        return lambda g: g[name].chunk(n, 0)[tp]

    def layer_of(name: str, i: int, cut: Any) -> Any:
        return lambda g: cut(g[f"decoder.layers.{name}"][i])

    columns = lambda t: t.chunk(n, 1)[tp]  # noqa: E731
    cuts = [
        ("self_attention.linear_qkv.layer_norm_weight", lambda t: t),
        ("self_attention.linear_proj.weight", columns),
        ("self_attention.linear_qkv.weight", lambda t: t.chunk(n, 0)[tp]),
        ("mlp.linear_fc1.layer_norm_weight", lambda t: t),
        ("mlp.linear_fc1.weight", lambda t: torch.cat([half.chunk(n, 0)[tp] for half in t.chunk(2, 0)])),
        ("mlp.linear_fc2.weight", columns),
    ]
    made = [("embedding", rows("embedding.word_embeddings.weight"))] if first else []
    made += [(f"{i} {name}", layer_of(name, i, cut)) for i in layers for name, cut in cuts]
    made += [("final", lambda g: g["decoder.final_layernorm.weight"])] if last else []
    return made + ([("output", rows("output_layer.weight"))] if last else [])


def model_shapes(run: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    h, f, v, d = run["hidden"], run["ffn"], run["vocab"], run["hidden"] // HEADS
    stacked = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_proj.weight": (h, h),
        "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * d, h),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (2 * f, h),
        "mlp.linear_fc2.weight": (h, f),
    }
    ends = {"embedding.word_embeddings.weight": (v, h), "decoder.final_layernorm.weight": (h,)}
    return {**ends, "output_layer.weight": (v, h), **{f"decoder.layers.{k}": (LAYERS, *s) for k, s in stacked.items()}}


def write_flat(run: dict[str, Any], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A dp_reshardable checkpoint, written with torch's own writer; returns the state in model space."""
    generator = torch.Generator().manual_seed(run["seed"])
    shapes = model_shapes(run)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    states = {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }
    stored = {name: (tensor, []) for name, tensor in weights.items()}
    per = LAYERS // (run["pp"] * run["vpp"])
    for pp, vp, tp in np.ndindex(run["pp"], run["vpp"], run["tp"]):
        begin = vp * LAYERS // run["vpp"] + pp * per
        ends = (pp == 0 and vp == 0, pp == run["pp"] - 1 and vp == run["vpp"] - 1)
        made = rank_parameters(run, tp, range(begin, begin + per), *ends)
        head = f"optimizer.distributed.dp_group_idx_{pp * run['tp'] + tp}.gbuf_idx_{vp}"
        for b, bucket in enumerate(buckets(made, states["param"], run["bucket"])):
            for kind, tensors in states.items():
                row = torch.zeros(bucket[-1][2])
                for cut, start, stop in bucket:
                    row[start:stop] = cut(tensors).reshape(-1)
                name = f"{head}.dtype_(torch.bfloat16, torch.float32).bucket_idx_{b}.{kind}"
                stored[name] = (row, run["cuts"])
    save(stored, folder)
    torch.save({"args": arguments(run), "checkpoint_version": 3.0, "iteration": 10}, folder / "common.pt")
    return {"weights": weights, **states}


def save(stored: dict[str, tuple[torch.Tensor, list[int]]], folder: Path) -> None:
    """A torch_dist checkpoint of tensors, each in chunks that begin at these rows."""
    items: dict[str, list[WriteItem]] = {}
    data: dict[tuple[str, torch.Size], torch.Tensor] = {}
    for name, (tensor, cuts) in stored.items():
        items[name] = []
        for lo, hi in itertools.pairwise(sorted({0, len(tensor), *(cut for cut in cuts if cut < len(tensor))})):
            at, part = torch.Size([lo] + [0] * (tensor.ndim - 1)), tensor[lo:hi].clone()
            chunk = metadata.ChunkStorageMetadata(at, part.shape)
            described = TensorWriteData(chunk, metadata.TensorProperties(dtype=tensor.dtype), tensor.shape)
            index = metadata.MetadataIndex(name, at, len(items[name]))
            items[name].append(WriteItem(index, WriteItemType.SHARD, tensor_data=described))
            data[name, at] = part

    class Planner(DefaultSavePlanner):
        def resolve_data(self, item: WriteItem) -> Any:
            return data[item.index.fqn, item.index.offset]

    folder.mkdir(parents=True)
    writer = FileSystemWriter(folder, thread_count=1)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(SavePlan([item for row in items.values() for item in row]))
    results = writer.write_data(writer.prepare_global_plan([plan])[0], Planner()).wait()
    tensors = {
        name: metadata.TensorStorageMetadata(
            row[0].tensor_data.properties, row[0].tensor_data.size, [item.tensor_data.chunk for item in row]
        )
        for name, row in items.items()
    }
    writer.finish(metadata.Metadata(tensors), [results])


def arguments(run: dict[str, Any]) -> argparse.Namespace:
    """Megatron's own."""
    return argparse.Namespace(
        num_layers=LAYERS, hidden_size=run["hidden"], ffn_hidden_size=run["ffn"], num_attention_heads=HEADS,
        group_query_attention=True, num_query_groups=GROUPS, kv_channels=run["hidden"] // HEADS, swiglu=True,
        untie_embeddings_and_output_weights=True, padded_vocab_size=run["vocab"], normalization="RMSNorm",
        tensor_model_parallel_size=run["tp"], pipeline_model_parallel_size=run["pp"], norm_epsilon=1e-5,
        virtual_pipeline_model_parallel_size=run["vpp"] if run["vpp"] > 1 else None, add_bias_linear=False,
        add_qkv_bias=False, position_embedding_type="rope", rotary_base=10000, max_position_embeddings=64,
        make_vocab_size_divisible_by=16, vocab_size=run["vocab"], transformer_impl="local",
    )  # fmt: skip


def buckets(made: list[tuple[str, Any]], tensors: dict[str, torch.Tensor], full: int) -> list[list[Any]]:
    """(cut, start, stop) of every parameter, bucket by bucket: last one first, a bucket is closed once it is full."""
    found: list[list[Any]] = [[]]
    at = 0
    for _, cut in reversed(made):
        if at >= full:
            found.append([])
            at = 0
        start = -(-at // 64) * 64
        at = start + cut(tensors).numel()
        found[-1].append((cut, start, at))
    return found


@given(run=flat_runs(), tp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2]))
@settings(max_examples=25)
def test_a_flat_checkpoint_of_other_code_comes_out_in_model_space(
    run: dict[str, Any], tp: int, pp: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("flat")
    expected = write_flat(run, root / STEP)
    to_megatron(root / STEP, root / "out", Parallel(tp=tp, pp=pp))
    found = global_tensors(root / "out" / STEP)
    named = {
        f"{'' if kind == 'weights' else f'optimizer.state.{kind}.'}{name}": tensor
        for kind, tensors in expected.items()
        for name, tensor in tensors.items()
    }
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        rows = len(tensor)
        assert torch.equal(found[name][:rows], tensor), name
    shutil.rmtree(root)


# What is refused.

PLAIN = {"tp": 1, "pp": 1, "vpp": 1, "hidden": 8, "ffn": 6, "vocab": 16, "cuts": [100], "bucket": 10**9, "seed": 0}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A target with something in it, which a refused conversion must leave alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("kept")
    return tmp_path / "out"


def refused(source: Path, target: Path, *said: str) -> None:
    with pytest.raises((MappingError, CheckpointError)) as caught:
        registry.convert(source, target, to="megatron", architecture="llama", options=SIXTEEN, overwrite=True)
    for text in said:
        assert text in str(caught.value)
    assert [path.name for path in target.iterdir()] == ["kept"]
    assert (target / "kept").read_text() == "kept"


def edited(folder: Path, change: Any) -> None:
    """Rewrites the metadata of a checkpoint."""
    with (folder / ".metadata").open("rb") as file:
        found = pickle.load(file)
    change(found)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(found, file)


def without_chunk(found: Any, name: str) -> None:
    chunks = found.state_dict_metadata[name].chunks
    lost = max(chunks, key=lambda chunk: chunk.offsets[0])
    chunks.remove(lost)
    for index in [i for i in found.storage_data if i.fqn == name and i.offset == lost.offsets]:
        del found.storage_data[index]


BUFFER = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0"


@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq"])
def test_a_buffer_that_lacks_its_end(kind: str, tmp_path: Path, kept: Path) -> None:
    write_flat(PLAIN, tmp_path / STEP)
    edited(tmp_path / STEP, lambda metadata: without_chunk(metadata, f"{BUFFER}.{kind}"))
    refused(tmp_path / STEP, kept)


def test_a_buffer_of_another_length(tmp_path: Path, kept: Path) -> None:
    write_flat({**PLAIN, "cuts": []}, tmp_path / STEP)

    write_flat({**PLAIN, "hidden": 12}, tmp_path / "other")
    for file in (tmp_path / "other").glob("*.distcp"):
        shutil.copy(file, tmp_path / STEP / f"other_{file.name}")

    def mixed(found: Any) -> None:
        with (tmp_path / "other/.metadata").open("rb") as file:
            other = pickle.load(file)
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            name = f"{BUFFER}.{kind}"
            for index in [i for i in found.storage_data if i.fqn == name]:
                del found.storage_data[index]
            found.state_dict_metadata[name] = other.state_dict_metadata[name]
            for index, info in other.storage_data.items():
                if index.fqn == name:
                    info.relative_path = f"other_{info.relative_path}"
                    found.storage_data[index] = info

    edited(tmp_path / STEP, mixed)
    refused(tmp_path / STEP, kept, "flat buffers do not fit the weights", "options={'optimizer': 'none'}")
    report = to_megatron(tmp_path / STEP, tmp_path / "bare", optimizer="none")
    assert any("optimizer" in reason for reason in report.left_out.values())


def dropped(found: Any, name: str) -> None:
    del found.state_dict_metadata[name]
    for index in [i for i in found.storage_data if i.fqn == name]:
        del found.storage_data[index]


def reshardable(tmp_path: Path) -> Path:
    write_flat(PLAIN, tmp_path / "flat" / STEP)
    to_megatron(tmp_path / "flat" / STEP, tmp_path / "full")
    return tmp_path / "full" / STEP


def test_a_kind_of_state_that_one_weight_lacks(tmp_path: Path, kept: Path) -> None:
    source = reshardable(tmp_path)
    edited(source, lambda m: dropped(m, "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"))
    refused(source, kept, "exp_avg")


def test_state_of_a_weight_that_is_not_there(tmp_path: Path, kept: Path) -> None:
    source = reshardable(tmp_path)

    def renamed(found: Any) -> None:
        old = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"
        new = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc9.weight"
        found.state_dict_metadata[new] = found.state_dict_metadata.pop(old)
        for index in [i for i in found.storage_data if i.fqn == old]:
            found.storage_data[type(index)(new, index.offset, index.index)] = found.storage_data.pop(index)

    edited(source, renamed)
    refused(source, kept)


# What megatron-core before 0.16 wrote by default: flattened shards.


@pytest.fixture(scope="module")
def flattened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on megatron-core 0.14.0 (llama at TP2 DP3, mixtral at EP2 DP4; tests.megatron_cpu.optimizer), and the
    same one on 0.16.1, which saves it as fully_reshardable."""
    folder = tmp_path_factory.mktemp("flattened")
    with tarfile.open(Path(__file__).parent / "golden/fully_sharded_model_space.tar.xz") as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("parallel", [Parallel(), Parallel(tp=2, pp=(1, 2))], ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_flattened_shards_are_put_together(family: str, parallel: Parallel, flattened: Path, tmp_path: Path) -> None:
    source = flattened / family / "fully_sharded_model_space"
    registry.convert(
        source, tmp_path / "out", to="megatron", config=flattened / family / "hf", parallel=parallel, options=SIXTEEN
    )
    found = global_tensors(next(path for path in (tmp_path / "out").iterdir() if path.is_dir()))
    expected = global_tensors(flattened / family / "fully_reshardable")
    assert found.keys() == expected.keys() and len(found) >= 4 * 9
    for name, tensor in expected.items():
        assert torch.equal(found[name][:32], tensor[:32]), name


@pytest.mark.parametrize("shape", [(32, 7), (33, 8), (32,), (0, 8)], ids=str)
def test_a_grid_that_does_not_fit_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    from formats import chunks
    from registry.storage import Piece

    piece = Piece("t", "float32", (1, 1, 5), 0, 0, None, (1, 0, 3), (2, 1, 128))
    good = [piece]
    chunks.unflatten(tmp_path, good, {"t": {"nd_reformulated_orig_global_shape": (32, 8)}})
    assert good == [Piece("t", "float32", (16, 8), 0, 0, None, (16, 0), (32, 8), stretch=(3, 5))]
    with pytest.raises(CheckpointError, match="grid of a flattened tensor"):
        chunks.unflatten(tmp_path, [piece], {"t": {"nd_reformulated_orig_global_shape": shape}})
