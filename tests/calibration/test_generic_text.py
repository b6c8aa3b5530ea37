import json

import pytest

from rac_modifier.calibration.generic_text import generic_token_sequences
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import GenericText
from tests.tiny import tiny_tokenizer

TEXTS = [f"document {i} " + "words " * 10 for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def read(tokenizer, seed=0, **source):
    return list(generic_token_sequences(tokenizer, GenericText(sequence_tokens=32, **source), seed))


def test_pythons_documentation_needs_no_download(tokenizer):
    sequences = read(tokenizer)
    assert len(sequences) > 100
    assert {len(s) for s in sequences} == {32}
    assert sequences == read(tokenizer)
    assert sequences != read(tokenizer, seed=1)
    assert not set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} & {
        i for s in sequences for i in s
    }


def test_every_file_type_gives_the_same_text(tokenizer, tmp_path):
    import datasets

    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    datasets.Dataset.from_dict({"body": TEXTS}).to_parquet(str(tmp_path / "t.parquet"))
    from_jsonl = read(tokenizer, source=str(tmp_path / "t.jsonl"), column="body")
    assert from_jsonl == read(tokenizer, source=str(tmp_path / "t.parquet"), column="body")
    total = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert len(from_jsonl) == total // 32
    (tmp_path / "t.txt").write_text("".join(TEXTS))
    from_txt = read(tokenizer, source=str(tmp_path / "t.txt"))
    assert sum(from_txt, []) == tokenizer("".join(TEXTS))["input_ids"][: 32 * len(from_txt)]  # noqa: RUF017


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "none.txt"}, "no such file"),
        ({"source": "none.jsonl", "column": "text"}, "no such file"),
        ({"source": "none.parquet", "column": "text"}, "no such file"),
        ({"source": "t.jsonl"}, "needs the name of its text column"),
        (
            {"source": "t.jsonl", "column": "body"},
            "row 1 has no text in column 'body'; its columns are text",
        ),
        ({"source": "empty.jsonl", "column": "text"}, "holds no text"),
        ({"source": "bad.jsonl", "column": "text"}, "line 2 is not JSON"),
        ({"source": "list.jsonl", "column": "text"}, "line 1 is a list"),
        ({"source": "bad.txt"}, "must hold text in UTF-8"),
        ({"source": "bad.parquet", "column": "text"}, "could not be read .*must hold Parquet"),
    ],
)
def test_what_cannot_be_read_is_refused(tokenizer, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "some words"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "some words"}\nnot json\n')
    (tmp_path / "list.jsonl").write_text('["some words"]\n["more words"]\n')
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(RacError, match=message):
        read(tokenizer, **source)
