import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# ci draws the same examples every time; `HYPOTHESIS_PROFILE=explore` looks for new ones.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8}
_LLAMA = {**_SMALL, "vocab_size": 131, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA31_ROPE = {"rope_theta": 500000.0, "rope_scaling": _LLAMA31_SCALING}
# By name: the transformers model_type, and what its config has other than the default.
HF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {**_LLAMA, "vocab_size": 128, "num_key_value_heads": 8}),
    "llama3": ("llama", {**_LLAMA, "rope_theta": 500000.0}),
    "llama31": ("llama", {**_LLAMA, "head_dim": 16, "max_position_embeddings": 131072, **_LLAMA31_ROPE}),
    "llama_tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "llama_bias": ("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama_attention_bias": (
        "llama",
        {**_LLAMA, "attention_bias": True},
    ),  # Megatron's standard model has no such thing
    "mistral": ("mistral", {**_LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen2": ("qwen2", {**_LLAMA, "num_key_value_heads": 2}),
    "qwen2_tied": ("qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16}),
    "qwen3_tied": ("qwen3", {**_LLAMA, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"vocab_size": 131, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 64}),
}


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`hf_model(name, dtype="float32", max_shard_size="5GB")`: the directory of a tiny random HuggingFace model.

    Every parameter is random, norms and biases too, so that one in the wrong place changes the logits. The bfloat16
    model is the float32 one, rounded. A directory is made once in a session: read it, and copy it to change it.
    """
    made: dict[tuple[str, str, str], Path] = {}

    def make(name: str, dtype: str = "float32", max_shard_size: str = "5GB") -> Path:
        key = (name, dtype, max_shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"hf-{name}-{dtype}")
            _save_model(made[key], *key)
        return made[key]

    return make


def _save_model(folder: Path, name: str, dtype: str, max_shard_size: str) -> None:
    import torch
    import transformers

    model_type, fields = HF_MODELS[name]
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **fields, **ends)
    )
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            is_norm = "norm" in key or ".ln_" in key
            draw = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim == 1 else 0.06)
            parameter.copy_(1 + draw if is_norm and key.endswith("weight") else draw)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


@pytest.fixture(autouse=True)
def fresh_catalog() -> Iterator[None]:
    """What a test registers is gone when it ends."""
    from registry import catalog, encoding

    tables: list[dict[Any, Any]] = [catalog._registered, catalog._containers, catalog._codecs, encoding._codecs]
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and moments of a small Llama in Megatron's names, trained for three steps on one process."""
    from tests.training.jobs import trained

    path = tmp_path_factory.mktemp("whole") / "state.pt"
    trained(path, "dense")
    return path


@pytest.fixture(scope="session")
def whole_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a small Mixtral, with the names of sequential experts."""
    from tests.training.jobs import trained

    path = tmp_path_factory.mktemp("whole") / "state.pt"
    trained(path, "sequential")
    return path
