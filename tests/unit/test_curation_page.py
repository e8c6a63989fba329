"""The page of a report: what was dropped and why, whatever the rows hold, and nothing from elsewhere."""

import html
import re

from curation_rows import curate, problem, sentence, write

from megatron_klear.cli.curate import main

EVIL = "</div></details><script>alert(1)</script> & @@BODY@@"


def text_of(page: str) -> str:
    """What a reader sees, without tags."""
    return html.unescape(re.sub(r"<[^>]*>", " ", page.partition("</style>")[2]))


def test_what_was_dropped_is_shown_with_examples_and_no_row_breaks_the_page(tmp_path):
    rows = write(tmp_path / "rows.jsonl", problem(EVIL), problem(EVIL), b"{")
    curate("deduplicate", "--input", rows, "--output", tmp_path / "out" / "rows.jsonl")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert page.count("<details>") == page.count("</details>") == 2
    seen = text_of(page)
    assert "deduplicate: 1 of 3 rows kept" in seen
    assert EVIL in seen
    assert "malformed_json 1 (33.3 %)" in seen


def test_a_build_has_one_page_over_all_its_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", *(problem(sentence(k % 40, 20)) for k in range(50)))
    (tmp_path / "build.toml").write_text(
        'output = "out"\nsources = [{ name = "made", files = ["rows.jsonl"] }]\n'
        'math_rl = { sources = ["made"], steps = [{ kind = "deduplicate" }, { kind = "select", total = 30 }] }\n'
    )
    main(["build", "--config", "build.toml"])
    seen = text_of((tmp_path / "out" / "report.html").read_text())
    for told in ("math_rl: 30 rows", "10 duplicate", "10 not_chosen", "math_rl, 2 select", "made", "100.0 %"):
        assert told in seen
