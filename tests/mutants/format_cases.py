"""Cases about the formats: what is in which rank's files, and what is beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import registry
from tests import (
    test_arguments,
    test_biases,
    test_dcp,
    test_families,
    test_golden_bridge,
    test_golden_megatron,
    test_golden_trtllm,
    test_legacy_layouts,
    test_legacy_optimizer,
    test_quantization,
    test_trtllm_layouts,
)
from tests.families import DCP, FAMILIES, HF, LEGACY, MEGATRON, TRTLLM

#: The fields of a `tests.mutants.cases.Case`.
Found = tuple[str, str, str, tuple[str, ...], Callable[[Path], None]]
BOTH = (MEGATRON, LEGACY)


def format_cases(models: Callable[[str], Path]) -> Iterator[Found]:
    """Every case of this module, on the directories of models by their names."""
    for name, family in FAMILIES.items():
        for to in (to for to in test_families.UNSAID if to in family.formats):
            yield f"facts of {name} in {to}", "config", family.architecture, (to, HF), partial(_facts, models, name, to)
    yield "arguments' values", "names", "llama", (*BOTH, HF), _arguments
    for name, own, formats, test in (*_trtllm(), *_megatron(), *_beside()):
        yield name, "golden", own, (*formats, HF), test


def _facts(models: Callable[[str], Path], name: str, to: str, scratch: Path) -> None:
    registry.convert(models(name), scratch / "there", to=to, durable=False)
    test_families.facts_come_back(name, to, models(name), scratch / "there")


def _arguments(scratch: Path) -> None:
    for to in BOTH:
        for arguments, facts in test_arguments.MEANING:
            test_arguments.test_what_an_argument_means(to, arguments, facts)
        test_arguments.test_what_is_not_said_is_as_megatron_has_it(to)


Test = tuple[str, str, tuple[str, ...], Callable[[Path], None]]


def _trtllm() -> Iterator[Test]:
    tests = test_trtllm_layouts
    for case in tests.WHOLE:
        yield f"{case} in every layout", case.family, (TRTLLM,), partial(tests.test_every_family_in_every_layout, case)
    for case in test_quantization.CASES:
        run = partial(test_quantization.test_what_the_real_exporter_wrote, case)
        yield f"{case} is written", case.family, (TRTLLM,), run
    for family, test in (
        ("gpt2", tests.test_rows_of_embeddings_are_rounded_up_to_the_ranks),
        ("mamba", tests.test_mamba_has_rows_for_a_vocabulary_rounded_up),
        ("bert", tests.test_a_bert_model_has_no_pooler),
        ("llama", tests.test_biases_of_a_gated_mlp),
        ("gemma2", tests.test_norms_may_be_cast_before_one_is_added),
        ("llama", test_golden_trtllm.test_fields_that_a_config_may_lack),
    ):
        yield test.__name__, family, (TRTLLM,), test


def _megatron() -> Iterator[Test]:
    legacy = test_legacy_layouts
    for family, case, pattern in (("deepseek_v2", *legacy.DOWN), ("gpt_oss", *legacy.BIASES)):
        yield f"rows of {pattern}", family, (LEGACY,), partial(legacy.test_ranks_have_their_rows, case, pattern)
    for modules in legacy.NAMED:
        for layers in ("local", "transformer_engine"):
            test = partial(legacy.test_the_names_of_experts_are_a_choice_of_their_own, modules, layers)
            yield f"{modules} experts, {layers}", "gpt_oss", (LEGACY,), test
    for layout, etp in legacy.FUSED:
        test = partial(legacy.test_experts_fused_into_two_tensors, layout, etp)
        yield f"fused experts {layout}", "mixtral", (LEGACY,), test
    for name, fields, to, options in test_biases.CASES:
        test = partial(test_biases.test_a_bias_lies_as_the_rows_of_its_matrix, name, fields, to, options)
        yield f"biases of {name} in {to}", FAMILIES[name].architecture, (to,), test
    yield "norms of heads", "stablelm", BOTH, legacy.test_norms_of_single_heads_follow_one_another
    yield "a mixer", "falcon_h1", BOTH, legacy.test_a_mixer_beside_attention
    yield "norms over heads", "minimax_m2", BOTH, test_golden_bridge.test_norms_over_all_heads_are_cut_among_the_ranks
    for model in ("gpt2", "llama", "mixtral"):
        test = partial(test_golden_megatron.test_norms_may_have_names_of_their_own, f"{model}/tp1pp1")
        yield f"norms of {model}", model, (MEGATRON,), test


def _beside() -> Iterator[Test]:
    yield "an optimizer of Megatron's", "llama", (DCP, MEGATRON), test_dcp.test_an_optimizer_of_megatron
    yield "besides", "llama", (DCP,), test_dcp.test_what_a_run_holds_besides_is_left_behind_and_said
    run = test_golden_megatron.test_what_a_run_holds_besides_is_left_out_and_said
    yield "besides, of Megatron's", "llama", (MEGATRON,), run
    rows = test_legacy_optimizer.test_what_megatron_wrote_is_written_again_bit_for_bit
    yield "rows of an optimizer", "llama", BOTH, rows
