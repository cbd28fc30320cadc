"""Models of which nothing but the loss is returned, and padded batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from zoo import VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = (9, 3, 4, 6)  # a token that sees itself alone has no gradient through its scores
T = 12


class OnlyLoss(nn.Module):
    """A model of which nothing but its loss is returned, as most training loops use it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train().double()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).loss


def bert(kind: str, attention: str, dropout: float) -> nn.Module:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = hf.BertConfig(**SIZES, **rates, num_labels=3, attn_implementation=attention)  # type: ignore
    config.problem_type = "single_label_classification" if kind == "SequenceClassification" else None
    return OnlyLoss(getattr(hf, f"Bert{kind}" if kind == "Model" else f"BertFor{kind}")(config))


def decoder(family: str, kind: str) -> nn.Module:
    if family == "GPT2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = hf.GPT2Config(**sizes, **rates, pad_token_id=0, num_labels=3)
    else:
        config = getattr(hf, f"{family}Config")(**SIZES, num_key_value_heads=2, num_labels=3)
    config.use_cache = False
    config.problem_type = "single_label_classification" if kind == "ForSequenceClassification" else None
    model = getattr(
        hf, family + {"ForCausalLM": "LMHeadModel"}.get(kind, kind) if family == "GPT2" else family + kind
    )
    model = model(config)
    model.loss_type = kind
    return OnlyLoss(model)


def t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0, use_cache=False)
    return OnlyLoss(hf.T5ForConditionalGeneration(config))


class MeanOfTokens(nn.Module):
    """A sentence encoder: the mean over the tokens that are none of padding, and a head."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        config = hf.BertConfig(**{**SIZES, **NO_DROPOUT, "num_hidden_layers": layers})
        self.encoder = hf.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 3)
        self.train().double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        shown = attention_mask.unsqueeze(-1).expand(hidden.size()).to(hidden.dtype)
        mean = (hidden * shown).sum(1) / shown.sum(1).clamp(min=1e-9)
        return F.cross_entropy(self.head(mean), labels)


def tokens(*, left: bool = False) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.zeros(len(LENGTHS), T, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(T - length, T) if left else slice(length)] = 1
    return torch.randint(3, VOCABULARY, mask.shape) * mask, mask


def classes(**side: bool) -> dict[str, Tensor]:
    ids, mask = tokens(**side)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def labelled(**side: bool) -> dict[str, Tensor]:
    ids, mask = tokens(**side)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids % 3, -100)}


def padded_left() -> dict[str, Tensor]:
    inputs = labelled(left=True)
    inputs["labels"][torch.arange(len(LENGTHS)), T - torch.tensor(LENGTHS)] = -100
    return inputs


def some_labelled() -> dict[str, Tensor]:
    """A prompt without a loss before each answer."""
    inputs = labelled()
    inputs["labels"][:, :2] = -100
    return inputs


def translation() -> dict[str, Tensor]:
    ids, mask = tokens()
    labels = torch.randint(3, VOCABULARY, (len(LENGTHS), 5))
    labels[1:, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "first token": (lambda: bert("SequenceClassification", "sdpa", 0.0), classes),
    "first token, dropout": (lambda: bert("SequenceClassification", "sdpa", 0.1), classes),
    "first token, eager": (lambda: bert("SequenceClassification", "eager", 0.1), classes),
    "every token": (lambda: bert("TokenClassification", "sdpa", 0.0), labelled),
    "some tokens": (lambda: bert("MaskedLM", "sdpa", 0.0), some_labelled),
    "mean of tokens": (MeanOfTokens, classes),
    "last token, gpt2": (lambda: decoder("GPT2", "ForSequenceClassification"), classes),
    "last token, llama": (lambda: decoder("Llama", "ForSequenceClassification"), classes),
    "last token, qwen2": (lambda: decoder("Qwen2", "ForSequenceClassification"), classes),
    "next token": (lambda: decoder("Llama", "ForCausalLM"), labelled),
    "next token, padded left": (lambda: decoder("Llama", "ForCausalLM"), padded_left),
    "next token, gpt2": (lambda: decoder("GPT2", "ForCausalLM"), some_labelled),
    "two sequences": (t5, translation),
}
