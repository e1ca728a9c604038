"""Megatron's models with an encoder: how each is built, and what it is called with. It imports Megatron."""

from typing import Any

import torch
from megatron.core.models.bert.bert_layer_specs import (
    bert_layer_local_spec,
    get_bert_layer_with_transformer_engine_spec,
)
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import (
    get_t5_decoder_with_transformer_engine_block_spec,
    get_t5_encoder_with_transformer_engine_block_spec,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from tests.megatron_cpu import Job


def bert(job: Job, config: TransformerConfig, stage: int | None, **arguments: Any) -> BertModel:
    spec = get_bert_layer_with_transformer_engine_spec() if job.engine else bert_layer_local_spec
    return BertModel(config, transformer_layer_spec=spec, vp_stage=stage, **arguments)


def bert_logits(model: BertModel, input_ids: Tensor) -> Tensor:
    """Of the masked tokens, for the ids as they are."""
    output = model(input_ids, torch.ones_like(input_ids), torch.zeros_like(input_ids))
    return output[0] if model.post_process else output


def t5(job: Job, config: TransformerConfig, stage: int | None, **arguments: Any) -> T5Model:
    assert stage is None and job.pp == 1, "Megatron's T5Model has no pipeline"
    encoder = get_t5_encoder_with_transformer_engine_block_spec(config.num_layers)
    decoder = get_t5_decoder_with_transformer_engine_block_spec(config.num_layers)
    return T5Model(config, config, encoder, decoder, **arguments)


def t5_logits(model: T5Model, input_ids: Tensor) -> Tensor:
    """The ids go in twice, as the encoder's and as the decoder's."""
    output: Tensor = model(input_ids, input_ids, None, None, None)
    return output
