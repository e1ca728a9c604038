"""What transformers computes, to hold Megatron's logits against."""

from pathlib import Path
from typing import Any

import torch


def reference_logits(
    hf: Path, input_ids: torch.Tensor, rounded: torch.dtype | None = None, **config: Any
) -> torch.Tensor:
    """Logits in float32 of the model in a directory, with these fields of its config changed.

    `rounded`: the weights are rounded to that type first. An encoder with a decoder gets the ids twice.
    """
    import transformers

    architecture = transformers.AutoConfig.from_pretrained(hf).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(
        hf, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", **config
    )
    inputs = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        for parameter in model.parameters() if rounded else ():
            parameter.copy_(parameter.to(rounded))
        output = model.eval()(input_ids, **inputs)
    logits: torch.Tensor = output.prediction_logits if "prediction_logits" in output else output.logits
    return logits
