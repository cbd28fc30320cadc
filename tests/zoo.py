"""Tiny models of the kinds that people train, with random weights, and a batch for each.

Every model comes in training mode with dropout 0, and every entry says how many linears it has: a test
asserts that all of them are in the report, and how many were rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 99
LENGTHS = (16, 3, 2, 4, 2, 3)  # of the samples of the padded batch: five rows of six are padding

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED_HEADS = {"num_key_value_heads": 2}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        build: makes the model; what it draws is fixed by the seed set before.
        inputs: makes its keyword arguments for a model.
        sites: how many linears it has.
        attentions: how many attentions.
        rewritten: how many of the linears are rewritten; all of them in a dense transformer.
        differentiable: the float input whose gradient is compared too, if there is one.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]
    sites: int
    attentions: int
    rewritten: int
    differentiable: str | None = None


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the zoo and its batch, the same at every call."""
    torch.manual_seed(0)
    entry = ZOO[name]
    model = entry.build().train().to(dtype)
    inputs = {k: v.to(dtype) if _is_float(v) else v for k, v in entry.inputs(model).items()}
    if entry.differentiable is not None:
        inputs[entry.differentiable] = inputs[entry.differentiable].detach().requires_grad_()
    return model, inputs


def loss_of(outputs: Any) -> Tensor:
    """The model's own loss, or for a bare tensor one in which every entry weighs differently."""
    if isinstance(outputs, Tensor):
        weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
        return (outputs * weights).sum()
    return outputs.loss


def gradients(
    model: nn.Module, inputs: dict[str, Any], run: Callable[..., Any] | None = None
) -> dict[str, Tensor | None]:
    """One forward and backward; the gradients of all parameters and of the inputs that want one.

    Args:
        run: the compiled model; the model itself if absent.
    """
    model.zero_grad()
    loss_of((model if run is None else run)(**inputs)).backward()
    wanted = {**dict(model.named_parameters()), **{k: v for k, v in inputs.items() if _is_float(v)}}
    found = {name: None if t.grad is None else t.grad.clone() for name, t in wanted.items()}
    for value in inputs.values():
        if isinstance(value, Tensor):
            value.grad = None
    return found


def linears(model: nn.Module) -> Iterator[str]:
    """What the report must call the linears of a model: the paths of all matrices that are multiplied by.

    A parameter that is not called ``weight`` is named itself, as in ``self_attn.in_proj_weight``.
    """
    looked_up = (nn.Embedding, nn.Conv2d)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if (
            parameter.dim() < 2
            or isinstance(model.get_submodule(owner), looked_up)
            or leaf in ("cls_token", "position_embeddings")
        ):
            continue
        yield owner if leaf == "weight" else name


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tokens(samples: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, length))


def _padded(model: nn.Module) -> dict[str, Any]:
    """Token labels of -100 at the padding: the rows of every layer's output gradient are zero there."""
    ids, mask = _tokens(len(LENGTHS), max(LENGTHS)), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids % 3, -100)}


def _one_class_each(model: nn.Module) -> dict[str, Any]:
    """One label per sample, read at one token: most rows of the last layer's gradient are zero."""
    return {"input_ids": _tokens(4, 16), "labels": torch.tensor([0, 1, 0, 1])}


def _embedded_classes(model: nn.Module) -> dict[str, Any]:
    return _embedded(model, _one_class_each(model))


def _causal(model: nn.Module) -> dict[str, Any]:
    ids = _tokens(4, 12)
    return {"input_ids": ids, "labels": ids.clone()}


def _embedded_causal(model: nn.Module) -> dict[str, Any]:
    return _embedded(model, _causal(model))


def _embedded_translation(model: nn.Module) -> dict[str, Any]:
    return _embedded(model, {"input_ids": _tokens(3, 9), "labels": _tokens(3, 5)})


def _embedded(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))  # type: ignore[operator]
    return {"inputs_embeds": embeddings.detach(), **inputs}


def _images(model: nn.Module) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 2])}


def _sequence(model: nn.Module) -> dict[str, Any]:
    return {"src": torch.randn(3, 7, 32)}


def bert(dropout: float = 0.0, layers: int = 2) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return hf.BertForTokenClassification(
        hf.BertConfig(**{**_SIZES, **rates, "num_hidden_layers": layers, "num_labels": 3})
    )


def gpt2(dropout: float = 0.0) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **special, **rates))
    model.loss_type = "ForCausalLM"  # what it would fall back to, with a message that breaks the graph
    return model


def _roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZES, **_NO_DROPOUT))


def _distilbert() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
    rates = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, **rates))


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_SIZES, **_GROUPED_HEADS, "num_hidden_layers": 2}))


def _qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES, **_GROUPED_HEADS))


def _t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **special))


def _vit() -> nn.Module:
    sizes = {key: _SIZES[key] for key in _SIZES if key.startswith(("hidden", "num", "intermediate"))}
    config = hf.ViTConfig(**sizes, **_NO_DROPOUT, image_size=8, patch_size=2, num_labels=3)
    return hf.ViTForImageClassification(config)


def _mixtral() -> nn.Module:
    options = {"num_local_experts": 4, "experts_implementation": "grouped_mm"}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, **_GROUPED_HEADS, **options))


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=1)


ZOO: dict[str, Entry] = {
    "bert": Entry(bert, _padded, sites=13, attentions=2, rewritten=13),
    "roberta": Entry(_roberta, _embedded_classes, 8, 1, 8, "inputs_embeds"),
    "distilbert": Entry(_distilbert, _one_class_each, sites=8, attentions=1, rewritten=8),
    "gpt2": Entry(gpt2, _causal, sites=5, attentions=1, rewritten=5),
    "llama": Entry(_llama, _embedded_causal, 15, 2, 15, "inputs_embeds"),
    "qwen2": Entry(_qwen2, _causal, sites=8, attentions=1, rewritten=8),
    "t5": Entry(_t5, _embedded_translation, 17, 3, 17, "inputs_embeds"),
    "vit": Entry(_vit, _images, 7, 1, 7, "pixel_values"),
    # Not rewritten: the two grouped products of the experts.
    "mixtral": Entry(_mixtral, _causal, sites=8, attentions=1, rewritten=6),
    "transformer encoder": Entry(_transformer_encoder, _sequence, 4, 1, 4, "src"),
}
