from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.sampling.thinking import thinking_length
from tests.tiny import byte_tokenizer


def test_the_tag_as_one_token_counts_as_thinking():
    tokenizer = byte_tokenizer()
    tag = tokenizer.convert_tokens_to_ids("</think>")
    assert thinking_length(tokenizer, [7, 8, tag, 9, 1]) == 3
    assert thinking_length(tokenizer, [7, 8]) == 2


@given(st.text("ab<>/ é", max_size=12), st.booleans(), st.text("ab<>/", max_size=12))
@settings(max_examples=50)
def test_thinking_length_where_the_tag_is_several_tokens(before, closed, after):
    tokenizer = byte_tokenizer(thinking_tags=False)
    text = before + ("</think>" if closed else "") + after
    ids = tokenizer.encode(text, add_special_tokens=False)
    tag_end = text.find("</think>")
    expected = len(ids) if tag_end < 0 else len(text[: tag_end + 8].encode())
    assert thinking_length(tokenizer, ids) == expected
