"""The example's data: parsing, the fixed shuffle, and refusals in sentences. Nothing here needs a network."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import reviews

LINES = (
    "1\t2.3\tA gem.\r\n"
    "2\t-1.5\tA tired clich\u00e9 of a film.\r\n"
    "3\t0.4\tSomewhat good, somewhat not.\r\n"
    "4\t-0.5\tToo tepid.\r\n"
    "5\t0.5\tGood enough.\r\n"
)
LABELS = {"A gem.": 1, "A tired clich\u00e9 of a film.": 0, "Too tepid.": 0, "Good enough.": 1}


@pytest.fixture
def snippets(tmp_path: Path) -> Path:
    path = tmp_path / Path(reviews.MEMBER).name
    path.write_bytes(LINES.encode())
    return path


def test_labels_are_the_sign_of_clear_ratings(snippets: Path) -> None:
    examples = reviews.parse_snippets(snippets)
    assert dict(zip(examples.texts, examples.labels, strict=True)) == LABELS


def test_the_shuffle_is_the_same_every_time(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"{i}\t{1 if i < 50 else -1}\ttext {i}\n" for i in range(100)), encoding="utf-8")
    first, again = reviews.parse_snippets(path), reviews.parse_snippets(path)
    assert first == again
    assert first.texts != sorted(first.texts, key=lambda text: int(text.split()[1]))
    assert 10 < sum(first.labels[:50]) < 40, "sorted by class in the file, mixed afterwards"


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.txt"
    path.write_text("1\t2.0\tfine\n2\tnot a rating\ttext\n", encoding="utf-8")
    with pytest.raises(reviews.DataError, match=r"broken\.txt, line 2: expected id, rating and text"):
        reviews.parse_snippets(path)


def test_a_changed_file_is_refused(snippets: Path) -> None:
    with pytest.raises(reviews.DataError, match=r"is not the file this example expects .* Delete the folder"):
        reviews.fetch_snippets(snippets.parent)


def test_the_file_is_taken_out_of_a_source_distribution_already_there(tmp_path: Path) -> None:
    _write_sdist(tmp_path / reviews.SDIST)
    path = reviews.fetch_snippets(tmp_path, sha256=hashlib.sha256(LINES.encode()).hexdigest())
    assert path.read_bytes() == LINES.encode()


def test_a_broken_source_distribution_is_refused(tmp_path: Path) -> None:
    (tmp_path / reviews.SDIST).write_bytes(b"half a download")
    with pytest.raises(reviews.DataError, match="Delete it and run again"):
        reviews.fetch_snippets(tmp_path)


def test_without_network_and_cache_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(
        returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(reviews.DataError, match=r"No matching distribution found\). Run once with a network"):
        reviews.fetch_snippets(tmp_path / "empty")


def test_hub_columns_are_found_by_name_then_by_type() -> None:
    string, classes = SimpleNamespace(dtype="string"), SimpleNamespace(names=["no", "yes"])
    assert reviews.pick_columns("a/b", {"label": classes, "text": string}) == ("text", "label")
    assert reviews.pick_columns("a/b", {"comment": string, "toxic": classes}) == ("comment", "toxic")
    with pytest.raises(reviews.DataError, match=r"--dataset a/b: no label column recognised among text"):
        reviews.pick_columns("a/b", {"text": string})


def test_a_hub_name_without_datasets_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(reviews.DataError, match="`pip install datasets`"):
        reviews.load_hub("fancyzhx/yelp_polarity", train_samples=100)


def _write_sdist(path: Path) -> None:
    """An archive within an archive, as the published one is."""
    inner = io.BytesIO()
    _write_member(inner, reviews.MEMBER, LINES.encode())
    with path.open("wb") as outer:
        _write_member(outer, reviews.ARCHIVE, inner.getvalue())


def _write_member(target: io.BytesIO | io.BufferedWriter, name: str, content: bytes) -> None:
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
