"""Sets of the hub, which is played here: what is asked of it, and what is said where it does not answer."""

import json
from pathlib import Path

import datasets
import pytest
from drawn import batches, decoded

from casp.data import fingerprint
from casp.errors import UserError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Replaces `load_dataset`; returns the list of its calls."""
    calls = []

    def load_dataset(path: str, name: str | None = None, **arguments):
        calls.append({"path": path, "name": name, **arguments})
        streaming = arguments.get("streaming", False)
        if path == "text":
            subset = arguments["data_files"].rsplit("/", 1)[1].removesuffix("_sample.jsonl")
            rows = [{"text": json.dumps({"text": f"{subset} {i} " * (i % 40), "meta": {}})} for i in range(400)]
        elif path == "allenai/c4":
            rows = [{"text": f"page {i} " * i, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for i in range(99)]
        elif path == "Salesforce/wikitext":
            rows = [{"text": row} for row in ["", " = Valkyria = \n", " Senjo no @-@ Valkyria , " * 20] * 9]
        else:
            rows = [{"sentence": "pierre <unk> N years old will join the board"} for _ in range(99)]
        found = datasets.Dataset.from_list(rows)
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("name", ["rp", "c4", "wikitext2", "ptb"])
def test_hub_sets(tiny_llama: Path, hub: list[dict], name: str):
    found = batches(tiny_llama, name, samples=20, seed=3)
    assert sum(len(batch["input_ids"]) for batch in found) == 20
    assert fingerprint(found) == fingerprint(batches(tiny_llama, name, samples=20, seed=3))
    assert fingerprint(found) != fingerprint(batches(tiny_llama, name, samples=20, seed=4))
    assert all(call["split"] == "train" and "trust_remote_code" not in call for call in hub)


def test_rp_mixes_its_parts(tiny_llama: Path, hub: list[dict]):
    texts = decoded(tiny_llama, batches(tiny_llama, "rp", samples=40))
    assert len(hub) == 11
    assert sum("cc_" in text for text in texts) > 10
    assert len({text.strip("0123456789 ").split(" ")[0] for text in texts}) > 5


def test_documents_give_one_window_each(tiny_llama: Path, hub: list[dict]):
    texts = decoded(tiny_llama, batches(tiny_llama, "c4", samples=60))
    pages = [text.split("page ")[1].split(" ")[0] for text in texts]
    assert len(set(pages)) == 60
    with pytest.raises(UserError, match=r"c4 has only .* documents of at least 500 tokens"):
        batches(tiny_llama, "c4", samples=90, sequence_length=500)


@pytest.mark.parametrize("name", ["rp", "c4", "wikitext2", "ptb"])
def test_unreachable_hub_names_the_remedy(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=f"'{name}' from the hub .*--dataset a local .txt or .jsonl file or 'demo'"):
        batches(tiny_llama, name)


def test_a_connection_that_breaks_on_the_way(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    def rows():
        yield {"text": "x" * 99}
        raise ConnectionError("Server disconnected")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(UserError, match="Server disconnected"):
        batches(tiny_llama, "c4")
