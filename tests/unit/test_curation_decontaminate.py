"""Overlaps with benchmarks: planted ones are found, phrases are not, and the vectorised scan is the plain one."""

import json
import random

import pytest
from curation_rows import PHRASE, curate, problem, read, sentence, write

from megatron_klear.curation.grams import GRAM_WORDS, Item, build_index
from megatron_klear.curation.text import words
from megatron_klear.data.rows import DataError

LONG = [sentence(number, 14 + number) for number in range(8)]
PHRASED = [f"{sentence(20 + number, 12)}, {PHRASE}." for number in range(3)]
SHORT = [
    "Simplify $\\sqrt{242}$.",
    "Evaluate $\\lfloor 3.2 \\rfloor$.",
    "Compute $\\sin 60^\\circ$ now, please.",
    "Simplify it.",
]
ITEMS = [*LONG, *PHRASED, *SHORT]
DISGUISES = {
    "verbatim": lambda text: text,
    "case": str.upper,
    "punctuation": lambda text: "; ".join(text.split()),
    "width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "white space": lambda text: "\n\n " + text.replace(" ", " \t "),
    "soft hyphens": lambda text: " ".join(f"{word[:2]}\u00ad{word[2:]}" for word in text.split(" ")),
    "underscores": lambda text: text.replace(" ", "_"),
}
RULES = ("paper", "careful")


@pytest.fixture
def benchmark_file(tmp_path):
    return write(tmp_path / "bench.jsonl", *({"problem": item} for item in ITEMS))


@pytest.mark.parametrize("rule", RULES)
def test_every_planted_overlap_is_found_and_told(tmp_path, benchmark_file, rule):
    planted = [disguise(item) for disguise in DISGUISES.values() for item in ITEMS]
    contained = [item for item in ITEMS if len(words(item)) > 2]  # a shorter one is found as a whole text alone
    planted += [f"{sentence(90, 30)} {item} {sentence(91, 30)}" for item in contained]
    clean = [sentence(1000 + number, 40) for number in range(50)]
    rows = write(tmp_path / "rows.jsonl", *map(problem, planted + clean))
    output = tmp_path / "out" / "rows.jsonl"
    report = curate("decontaminate", "--input", rows, "--output", output, "--against", benchmark_file, "--rule", rule)
    assert [row["prompt"] for row in read(output)] == clean
    assert report["counts"] == {
        "rows": len(planted + clean), "kept": len(clean), "dropped": len(planted), "bad": 0
    }  # fmt: skip
    hits = read(output.with_name("hits.jsonl"))
    assert [hit["row"] for hit in hits] == list(range(1, len(planted) + 1))
    expected = [*ITEMS * len(DISGUISES), *contained]
    for hit, item, text in zip(hits, expected, planted, strict=True):
        assert hit["item"] == {"file": str(benchmark_file), "row": ITEMS.index(item) + 1}
        assert hit["share"] == 1
        assert words(text)[slice(*hit["span"])] == words(item)
        assert hit["text"] == " ".join(words(item))
        assert hit["gram"]["documents"] >= len(DISGUISES)
        assert hit["gram"]["benchmark_items"] == 1


@pytest.mark.parametrize(("rule", "kept"), [("paper", 0), ("careful", 20)])
def test_a_phrase_of_several_items_is_a_hit_of_the_paper_s_rule_alone(tmp_path, benchmark_file, rule, kept):
    controls = [problem(f"{sentence(500 + number, 20)} {PHRASE}") for number in range(20)]
    rows = write(tmp_path / "rows.jsonl", *controls, problem("the one that stays"))
    output = tmp_path / "out" / "rows.jsonl"
    report = curate("decontaminate", "--input", rows, "--output", output, "--against", benchmark_file, "--rule", rule)
    assert report["counts"]["kept"] == kept + 1
    assert report["common_grams"][0]["documents"] == 20
    assert report["common_grams"][0]["benchmark_items"] == len(PHRASED)


def test_the_share_of_an_item_s_grams_decides(tmp_path):
    item = sentence(7, 28)  # 20 grams
    bench = write(tmp_path / "bench.jsonl", {"question": item})
    part = " ".join(item.split()[:12])  # 4 of them
    rows = write(tmp_path / "rows.jsonl", problem(f"{part} and something else"), problem("other"))
    kept = {}
    for share in ("0.2", "0.21"):
        output = tmp_path / share / "rows.jsonl"
        arguments = ("--output", output, "--against", bench, "--rule", "careful", "--min-share", share)
        kept[share] = curate("decontaminate", "--input", rows, *arguments)["counts"]["kept"]
    assert kept == {"0.2": 1, "0.21": 2}


def test_versions_of_one_item_are_one_item(tmp_path):
    item = sentence(3, 40)
    first = write(tmp_path / "a.jsonl", {"problem": item})
    second = write(tmp_path / "b.jsonl", {"problem": item.upper()}, {"problem": f"Hint: {item} Answer briefly."})
    rows = write(tmp_path / "rows.jsonl", problem(" ".join(item.split()[:25])), problem("other"))
    output = tmp_path / "out" / "rows.jsonl"
    arguments = ("--output", output, "--against", first, second, "--rule", "careful")
    report = curate("decontaminate", "--input", rows, *arguments)
    assert report["counts"]["dropped"] == 1
    assert report["benchmark"]["items"] == 2
    assert report["examples"]["contaminated"][0]["gram"]["benchmark_items"] == 1


def test_a_template_is_cut_before_items_are_indexed(tmp_path):
    template = "You will be given a question and will write a correct program that passes all tests."
    bench = write(tmp_path / "bench.jsonl", *({"prompt": f"{template}\n\nQuestion: {item}"} for item in LONG))
    (tmp_path / "template.txt").write_text(template.upper())
    rows = write(tmp_path / "rows.jsonl", problem(f"{template} Add two numbers."), problem(LONG[0]))
    arguments = ("--against", bench, "--rule", "paper", "--input", rows)
    output = tmp_path / "with" / "rows.jsonl"
    curate("decontaminate", *arguments, "--output", output, "--template", tmp_path / "template.txt")
    assert [row["prompt"] for row in read(output)] == [f"{template} Add two numbers."]
    with pytest.raises(DataError, match="no row is left of 2"):
        curate("decontaminate", *arguments, "--output", tmp_path / "without" / "rows.jsonl")


@pytest.mark.parametrize("seed", range(5))
def test_the_scan_finds_what_sets_of_tuples_find(seed):
    chosen = random.Random(seed)
    vocabulary = ["a", "b", "c2"]  # so few that grams meet by chance

    def text(least: int, most: int) -> list[str]:
        return [chosen.choice(vocabulary) for _ in range(chosen.randint(least, most))]

    items = [tuple(text(3, 14)) for _ in range(40)]
    index = build_index([Item({"file": "f", "row": k}, (item,)) for k, item in enumerate(items)])
    grams = {
        item[k : k + GRAM_WORDS] for item in items for k in range(max(1, len(item) - GRAM_WORDS + 1))
    }  # an item of fewer words is its own gram
    texts = [
        [chosen.choice([*vocabulary, "unknown"]) if chosen.random() < 0.1 else w for w in text(0, 40)]
        for _ in range(60)
    ]
    expected = {}
    for number, tokens in enumerate(texts):
        places = [(k, gram) for k in range(len(tokens)) for gram in grams if tuple(tokens[k : k + len(gram)]) == gram]
        if places:
            expected[number] = sorted(places)
    found = {
        number: sorted((k, index.texts[gram]) for k, gram in zip(match.positions, match.grams, strict=True))
        for number, match in index.scan([" ".join(tokens) for tokens in texts]).items()
    }
    assert found == expected
    assert len(expected) > 10


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"{", "bench.jsonl:2: not valid JSON"),
        ({"solution": "x"}, "bench.jsonl:2: no problem under any of"),
        ({"problem": "?!"}, "bench.jsonl:2: nothing but templates"),
    ],
)
def test_an_item_that_cannot_be_read_stops(tmp_path, row, told):
    bench = write(tmp_path / "bench.jsonl", {"problem": LONG[0]}, row)
    rows = write(tmp_path / "rows.jsonl", problem("x"))
    arguments = ("--input", rows, "--output", tmp_path / "out" / "rows.jsonl", "--against", bench, "--rule", "paper")
    with pytest.raises(DataError, match=told):
        curate("decontaminate", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "told"), [("nowhere to be seen", "no benchmark item has"), ("--", "no letters")])
def test_a_template_that_does_nothing_is_refused(tmp_path, benchmark_file, text, told):
    (tmp_path / "template.txt").write_text(text)
    rows = write(tmp_path / "rows.jsonl", problem("x"))
    arguments = ("--input", rows, "--output", tmp_path / "o.jsonl", "--against", benchmark_file, "--rule", "paper")
    with pytest.raises(DataError, match=told):
        curate("decontaminate", *arguments, "--template", tmp_path / "template.txt")


def test_real_problems_give_the_numbers_of_the_rule(tmp_path, shared_data):
    """659 of the 7,474 problems of MATH's training half share a 9-gram with these benchmarks, none is MATH-500's."""
    train = json.loads((shared_data / "math" / "math_train_7474.json").read_text())
    rows = write(tmp_path / "rows.jsonl", *(problem(row["problem"]) for row in train))
    tested = json.loads((shared_data / "math" / "math500_test.json").read_text())
    bench = write(tmp_path / "math500.jsonl", *({"problem": row["problem"]} for row in tested))
    others = [shared_data / "aime_hmmt" / name for name in ("aime24.qs.jsonl", "aime25.qs.jsonl", "HMMT-202502.jsonl")]
    others.append(shared_data / "lcb_v5_prompts" / "livecodebench_v5.jsonl")
    arguments = ("--output", tmp_path / "o.jsonl", "--against", bench, *others, "--rule", "paper")
    assert curate("decontaminate", "--input", rows, *arguments)["counts"]["dropped"] == 659


def test_what_many_rows_of_a_source_have_is_a_phrase_there_alone(tmp_path):
    item = f"{PHRASE} {sentence(1, 40)}"
    bench = write(tmp_path / "bench.jsonl", {"problem": item})
    template = [problem(f"{sentence(100 + k, 12)} {PHRASE}") for k in range(40)]
    copy = problem(f"{sentence(1, 40)} Go on.")
    first = write(tmp_path / "first.jsonl", *template, copy)
    second = write(tmp_path / "second.jsonl", template[0], *(problem(sentence(200 + k, 12)) for k in range(40)))
    given = ("--input", first, second, "--against", bench, "--rule", "careful")

    def dropped(name: str, *flags: object) -> list[int]:
        report = curate("decontaminate", *given, "--output", tmp_path / name / "rows.jsonl", *flags)
        return [source["dropped"] for source in report["sources"]]

    assert dropped("all") == [41, 1]
    assert dropped("share", "--max-documents-share", 0.5) == [1, 1]
    assert dropped("high", "--max-documents-share", 0.99) == [41, 1]
    report = json.loads((tmp_path / "share" / "report.json").read_text())
    assert " ".join(PHRASE.split()[:9]) in report["phrases"][str(first)]
    assert report["phrases"][str(second)] == []
    one = ("--max-documents-share", 0.4, "--source", "data_source")
    assert dropped("by_field", *one, "--workers", 2) == [1, 0]
