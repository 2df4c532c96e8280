"""Tokenizers with new tokens: claims K1 to K3 of `refpeft.checkpoint.tokens`, for each kind of tokenizer."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from refpeft.checkpoint import tokens
from refpeft.checkpoint.safetensors import Malformed

ENGLISH = ["the cat sat on the mat, and the art of the start was a hat.", "a cat is a cat; the mat is flat."] * 3
OTHER = ["ломи ката навели толе", "ката толе ломика, сене навели", "сене ломи, толе ката"] * 3  # of no language
NEW = ["ломи", "ломика", " ката", "толе"]


def trained(t: Any, trainer: Any, texts: list[str], size: int, special: list[str], **options: Any) -> Any:
    t.train_from_iterator(
        texts, trainer(vocab_size=size, show_progress=False, special_tokens=special, min_frequency=0, **options)
    )
    return t


def gpt2(texts: list[str] = ENGLISH, size: int = 300) -> Any:
    """Byte-level BPE."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(t, trainers.BpeTrainer, texts, size, ["<|end|>"], initial_alphabet=alphabet)


def llama(texts: list[str] = ENGLISH, size: int = 400) -> Any:
    """BPE of letters, spaces as ▁, and bytes for what has no piece: LLaMA's, as its tokenizer.json has it."""
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    return trained(t, trainers.BpeTrainer, texts, size, special)


def bert() -> Any:
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    letters = sorted(set("".join(OTHER)) - {" "})
    return trained(t, trainers.WordPieceTrainer, ENGLISH, 90, ["[UNK]", "[CLS]"], initial_alphabet=letters)


KINDS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def cut(t: Any, text: str) -> list[str]:
    return list(t.encode(text, add_special_tokens=False).tokens)


# ── added tokens ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_old_texts_are_cut_as_before(kind: str) -> None:
    """K1"""
    old = KINDS[kind]()
    new = tokens.added(old, NEW)
    for text in [*ENGLISH, "a hat, к", "", "Zebra  ждать\n"]:
        assert new.encode(text).ids == old.encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_one_each(kind: str) -> None:
    """K2: the leftmost, and of those there the longest, next to anything; ids that follow."""
    old = KINDS[kind]()
    new = tokens.added(old, NEW)
    v = tokens.following(old)
    assert [new.token_to_id(t) for t in NEW] == [v, v + 1, v + 2, v + 3]
    ids = new.encode("the ломика ката,толеломи").ids
    assert [i for i in ids if i >= v] == [v + 1, v + 2, v + 3, v]
    assert old.get_vocab_size() == new.get_vocab_size() - 4  # the old one is as it was


def test_what_was_decoded_to_itself_still_is() -> None:
    """K3"""
    old, text = gpt2(), "the ломика  ката, and толеломи ждать\n a hat."
    assert old.decode(old.encode(text).ids) == text
    for new in (tokens.added(old, NEW), tokens.merged(old, gpt2(OTHER))[0]):
        assert new.decode(new.encode(text).ids) == text


def test_inside_words_or_not() -> None:
    """In Latin letters a short token would stand in many a word: `single_word` keeps it out."""
    old = gpt2()
    assert "ar" in cut(tokens.added(old, ["ar"]), "the bark")
    new = tokens.added(old, ["ar"], single_word=True)
    assert cut(new, "the bark") == cut(old, "the bark")
    assert "ar" in cut(new, "the ar, bark")


def test_a_normaliser_does_not_hide_a_token() -> None:
    """LLaMA's would look for ▁толе; BERT's lowers what it looks in, so that a lower-case token is found there too."""
    assert cut(tokens.added(llama(), ["толе"]), "cat-толе")[-1] == "толе"
    assert "гора" in cut(tokens.added(bert(), ["гора"]), "the ГОРА")
    assert "ГОРА" in cut(tokens.added(bert(), ["ГОРА"]), "the ГОРА")


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [gpt2, llama])
def test_merged_bpe(make: Any) -> None:
    """K1, K2: and a text of the new language takes as few tokens as with its own tokenizer."""
    old, other = make(), make(OTHER)
    new, pieces, made = tokens.merged(old, other)
    v = tokens.following(old)
    assert [new.token_to_id(p) for p in pieces] == list(range(v, v + len(pieces)))
    assert not set(pieces) & old.get_vocab().keys()
    for text in [*ENGLISH, "Zebras start"]:
        assert new.encode(text).ids == old.encode(text).ids
    for text in OTHER:
        assert cut(new, text) == cut(other, text)
        assert len(cut(new, text)) < len(cut(old, text)) / 2
    for piece, ids in zip(pieces, made, strict=True):
        assert [t.value for t in new.model.tokenize(piece)] == [piece]
        assert ids == [t.id for t in old.model.tokenize(piece)]
        assert all(i < v for i in ids)


def test_merging_twice_adds_nothing() -> None:
    new, pieces, _ = tokens.merged(gpt2(), gpt2(OTHER))
    assert len(pieces) > 20
    again, more, _ = tokens.merged(new, gpt2(OTHER))
    assert more == []
    assert again.get_vocab() == new.get_vocab()


def test_a_piece_without_a_way_to_it_is_left_out() -> None:
    """The old merges cut 'abc' as ab|c, so that the new a|bc never comes to pass: no id is wasted on it."""
    letters = {"a": 0, "b": 1, "c": 2}
    old = Tokenizer(models.BPE(letters | {"ab": 3}, [("a", "b")]))
    other = Tokenizer(models.BPE(letters | {"bc": 3, "abc": 4, "cc": 5}, [("b", "c"), ("a", "bc"), ("c", "c")]))
    new, pieces, made = tokens.merged(old, other)
    assert pieces == ["bc", "cc"]
    assert made == [[1, 2], [2, 2]]
    assert cut(new, "abccc") == ["ab", "cc", "c"]


def test_no_merge_comes_in_that_makes_an_old_piece() -> None:
    """K1: the old merges leave 'abc' at a|bc; the new tokenizer's merge of these would change a text of old tokens."""
    letters = {"a": 0, "b": 1, "c": 2, "bc": 3}
    old = Tokenizer(models.BPE(letters | {"ab": 4, "abc": 5}, [("b", "c"), ("a", "b"), ("ab", "c")]))
    other = Tokenizer(models.BPE(letters | {"abc": 4, "cc": 5}, [("b", "c"), ("a", "bc"), ("c", "c")]))
    new, pieces, _ = tokens.merged(old, other)
    assert pieces == ["cc"]
    assert cut(new, "abc") == cut(old, "abc") == ["a", "bc"]


# ── files and mistakes ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_is_a_token_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffломи\r\n ката\n\n  \nломи\nтоле".encode())
    assert tokens.lines(path) == ["ломи", " ката", "толе"]
    path.write_bytes(b"ab\n\xff")
    with pytest.raises(Malformed, match="expected UTF-8, found something else at byte 3"):
        tokens.lines(path)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    for old, other, words in (
        (bert(), gpt2(), "the model's tokenizer is WordPiece"),
        (gpt2(), bert(), "the new one is WordPiece"),
        (gpt2(), llama(), "its normalizer is Prepend, Replace, the model's none"),
    ):
        with pytest.raises(ValueError, match=words):
            tokens.merged(old, other)
    with pytest.raises(Malformed, match="there is no tokenizer"):
        tokens.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(Malformed, match="not a tokenizer"):
        tokens.read(tmp_path)


def test_a_token_that_is_there_already_is_refused() -> None:
    with pytest.raises(ValueError, match="'the' should get the id 289, but gets 259"):
        tokens.added(gpt2(), ["ломи", "the"])


def test_every_claim_is_cited_here() -> None:
    cited = " ".join(f.__doc__ or "" for n, f in globals().items() if n.startswith("test_"))
    labels = re.findall(r"^    ([A-Z]+\d+) ", tokens.__doc__ or "", re.M)
    assert labels == ["K1", "K2", "K3"]
    assert [label for label in labels if not re.search(rf"\b{label}\b", cited)] == []
