"""Only the needed rows are carried from op to op in the models that people train: gradients are those of
carrying all, in float64 to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from carried import INDUCTORS, assert_equal, compile_and_compare, counts, gradients
from padded import CASES, classes
from sparse_compile.passes import layouts
from torch import Tensor, nn
from tracing import Tracer
from transformers import BertConfig, BertModel

# Of how many linears of padded.CASES the rows are carried.
CARRIED = {
    **dict.fromkeys(("first token", "first token, dropout", "first token, eager"), (12, 14)),
    **{"every token": (13, 13), "some tokens": (14, 14), "mean of tokens": (12, 13)},
    **dict.fromkeys(("last token, llama", "last token, qwen2", "next token"), (15, 15)),
    **dict.fromkeys(("last token, gpt2", "next token, gpt2"), (9, 9)),
    "next token, padded left": (15, 15),
    "two sequences": (33, 33),  # of the encoder and of the decoder
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_FEWEST_ROWS", 2)
    torch._dynamo.reset()
    torch.manual_seed(0)


def of_all_rows(model: nn.Module, decomposed: bool, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients where all rows are carried. (Decompositions round otherwise than eager's kernels,
    some to float32, and dropout draws other numbers; as traced it is what the model does uncompiled.)"""
    run = model
    if decomposed:
        torch._dynamo.reset()
        run = torch.compile(model, backend=Tracer(INDUCTORS()), fullgraph=True)
    return gradients(model, run, **inputs)


# Inductor decomposes what it is given, aot_eager leaves it as traced: of some models both are tried.
BOTH = ("first token, dropout", "every token", "last token, gpt2", "two sequences")


@pytest.mark.parametrize(
    ("case", "decomposed"),
    [*((case, True) for case in CASES), *((case, False) for case in BOTH)],
    ids=lambda value: value if isinstance(value, str) else ("decomposed" if value else "as traced"),
)
def test_gradients_are_those_of_carrying_all_rows(case, decomposed):
    build, batch = CASES[case]
    model = build()
    tracer = Tracer(INDUCTORS() if decomposed else None, compact=True)
    found = gradients(model, torch.compile(model, backend=tracer, fullgraph=True), **batch())
    assert_equal(found, of_all_rows(model, decomposed, batch()))
    assert counts(tracer) == CARRIED[case]


@pytest.mark.parametrize(("case", "decomposed"), [("first token", True), ("last token, gpt2", False)])
def test_gradients_under_dynamic_shapes(case, decomposed):
    build, inputs = CASES[case]
    model, tracer = build(), Tracer(INDUCTORS() if decomposed else None, compact=True)
    compiled = torch.compile(model, backend=tracer, fullgraph=True, dynamic=True)
    assert_equal(gradients(model, compiled, **inputs()), of_all_rows(model, decomposed, inputs()))
    assert counts(tracer) == CARRIED[case]


def test_heads_as_many_as_tokens():
    """[B, heads, T, …] then looks like [B, T, …]."""
    sizes = {"vocab_size": 99, "hidden_size": 24, "num_attention_heads": 12, "intermediate_size": 20}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **rates, num_hidden_layers=2, max_position_embeddings=12)

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel(config, add_pooling_layer=False).double()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            return F.normalize((hidden * attention_mask.unsqueeze(-1)).sum(1)).cos().sum()

    inputs = classes()
    assert inputs["input_ids"].shape[1] == 12
    tracer = compile_and_compare(Mean(), inputs["input_ids"], inputs["attention_mask"])
    assert counts(tracer) == (12, 12)
