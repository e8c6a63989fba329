"""Texts that curation takes for the same, and those it keeps apart."""

import pytest

from megatron_klear.curation.text import exact_key, normalise


@pytest.mark.parametrize(
    "other",
    ["FIND x2.", "  find\tx\u00b2.\n", "\uff26ind\u00a0x\u00b2.", "Find  x\u00b2.", "\ufeffFi\u00adnd x\u200d2."],
)
def test_case_width_and_white_space_do_not_tell_texts_apart(other: str) -> None:
    assert normalise(other) == "find x2."
    assert exact_key(other) == exact_key("Find x\u00b2.")


@pytest.mark.parametrize("other", ["Find x2", "Find x3.", "Findx2.", "\ud800"])
def test_other_texts_have_other_keys(other: str) -> None:
    assert exact_key(other) != exact_key("Find x2.")
