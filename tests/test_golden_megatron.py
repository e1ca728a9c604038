"""Checkpoints that Megatron's own code wrote, in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import registry
from tests.goldens import MegatronCase, golden, megatron_cases

CASES = megatron_cases()
FORMATS = {"torch_dist": "megatron", "torch": "megatron-legacy"}


def test_no_family_is_missing() -> None:
    assert {case.family for case in CASES} <= set(registry.architectures())
    assert len(CASES) >= 19


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("how", ["config", "architecture"])
def test_golden_becomes_its_huggingface_model(case: MegatronCase, how: str, tmp_path: Path) -> None:
    hf = golden(case.hf)
    if how == "config":
        report = registry.convert(case.path, tmp_path / "out", to="huggingface", config=hf)
    else:
        report = registry.convert(case.path, tmp_path / "out", to="huggingface", architecture=case.family)
    assert report.source_format == FORMATS[case.format]
    found = load_file(tmp_path / "out/model.safetensors")
    if how == "architecture":  # Megatron records only the padded vocabulary; the rest is padding
        found = {n: t[: case.true_vocab] if re.search("embed_tokens|lm_head|wte", n) else t for n, t in found.items()}
    if case.trained and case.hf_expected is None:
        weights = {name: t.dtype for name, t in load_file(hf / "model.safetensors").items()}
        assert found.keys() == weights.keys()
        assert {str(t.dtype) for t in found.values()} == {f"torch.{case.dtype}"}
        return
    expected = load_file(golden(case.hf_expected or case.hf) / "model.safetensors")
    equal(found, {name: t.to(getattr(torch, case.dtype)) for name, t in expected.items()})


def global_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What megatron-core itself reads of a torch_dist directory, every tensor whole."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(directory)
    wanted = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(wanted, storage_reader=reader, no_dist=True)
    return wanted


def without_padding(tensors: dict[str, torch.Tensor], vocab: int) -> dict[str, torch.Tensor]:
    return {
        name: t[:vocab] if re.search(r"word_embeddings|output_layer", name) and t.ndim == 2 else t
        for name, t in tensors.items()
    }


def layout(case: MegatronCase) -> registry.Parallel:
    return registry.Parallel(**{k: v for k, v in case.layout.items() if k in ("tp", "pp", "vpp", "ep")})


def options(case: MegatronCase) -> dict[str, object]:
    implementation = "transformer_engine" if case.spec == "te" else "local"
    return {"make_vocab_size_divisible_by": 16, "transformer_impl": implementation}


WRITTEN = [case for case in CASES if not case.trained]


@pytest.mark.parametrize("case", [c for c in WRITTEN if c.format == "torch_dist"], ids=str)
def test_we_write_the_torch_dist_golden(case: MegatronCase, tmp_path: Path) -> None:
    registry.convert(
        golden(case.hf), tmp_path / "out", to="megatron", parallel=layout(case), dtype=case.dtype,
        options=options(case),
    )  # fmt: skip
    ours, theirs = global_tensors(tmp_path / "out/release"), global_tensors(golden(case.iter_dir))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    equal(without_padding(ours, case.true_vocab), without_padding(theirs, case.true_vocab))


@pytest.mark.parametrize("case", [c for c in WRITTEN if c.format == "torch"], ids=str)
def test_we_write_the_per_rank_golden(case: MegatronCase, tmp_path: Path) -> None:
    registry.convert(
        golden(case.hf), tmp_path / "out", to="megatron-legacy", parallel=layout(case), dtype=case.dtype,
        options=options(case) | ({} if case.grouped_gemm else {"expert_modules": "sequential"}),
    )  # fmt: skip
    theirs = sorted(golden(case.iter_dir).glob("mp_rank_*/model_optim_rng.pt"))
    assert theirs
    ours = sorted((tmp_path / "out/release").glob("mp_rank_*/model_optim_rng.pt"))
    assert [p.parent.name for p in ours] == [p.parent.name for p in theirs]
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        tp = int(re.findall(r"\d+", mine.parent.name)[0])
        compare_rank(torch.load(mine, weights_only=False), load_golden(other), case, tp, index)


def load_golden(path: Path) -> dict[str, object]:
    """The golden's model, with megatron's own classes in its arguments replaced by nothing."""
    import pickle
    import types

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if module.startswith("megatron"):
                return lambda *_: None
            return super().find_class(module, name)

    fake = types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="fake")
    loaded: dict[str, object] = torch.load(path, pickle_module=fake, weights_only=False)
    return loaded


def compare_rank(mine: dict, other: dict, case: MegatronCase, tp: int, index: int) -> None:
    models = [key for key in other if re.fullmatch(r"model\d*", key)]
    assert models == [key for key in mine if re.fullmatch(r"model\d*", key)]
    for key in models:
        tensors = [{n: t for n, t in side[key].items() if torch.is_tensor(t) and t.numel()} for side in (mine, other)]
        rows = case.padded_vocab // case.layout.get("tp", 1)
        real = max(0, min(rows, case.true_vocab - tp * rows))
        equal(*(without_padding(side, real) for side in tensors))
        extra = [{n for n in side[key] if n.endswith("_extra_state")} for side in (mine, other)]
        # Transformer-Engine's norms carry an extra state too in some versions; what it lacks it does not ask for.
        assert extra[0] <= extra[1] if case.spec == "te" else extra[0] == extra[1], f"rank {index}"


@pytest.mark.parametrize("case", [c for c in CASES if c.family != "gpt2"][:3], ids=str)
def test_bare_checkpoint_of_an_ambiguous_family_is_refused(case: MegatronCase, tmp_path: Path) -> None:
    if case.family != "llama":
        pytest.skip("only Llama's tensors fit two families")
    with pytest.raises(registry.DetectionError, match="llama, mistral"):
        registry.convert(case.path, tmp_path / "out", to="huggingface")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_bare_checkpoint_of_a_clear_family_is_recognised(family: str) -> None:
    case = next(case for case in CASES if case.family == family)
    opened = registry.open(case.path)
    assert opened.architecture == family
    assert opened.iteration == 10


def test_optimizer_and_random_state_are_reported() -> None:
    case = next(case for case in CASES if case.optimizer and case.format == "torch_dist")
    found = registry.inspect(case.path, architecture=case.family)
    reasons = " ".join(found.left_out.values())
    assert "optimizer" in reasons
    assert "random state" in reasons


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_verify_against_the_model_it_was_filled_from(case: MegatronCase) -> None:
    assert registry.verify(case.path, golden(case.hf))


def test_config_flag_takes_a_file_too(tmp_path: Path, hf_model: Callable[..., Path]) -> None:
    case = next(case for case in CASES if case.family == "llama")
    config = golden(case.hf) / "config.json"
    registry.convert(case.path, tmp_path / "out", to="huggingface", config=config)
    assert (tmp_path / "out/config.json").read_bytes() == config.read_bytes()
