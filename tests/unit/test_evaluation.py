"""Evaluation from files to a table: benchmarks' own forms, stops at any byte, what is refused."""

import gzip
import json
import random
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_klear.cli import evaluate as command
from megatron_klear.cli.evaluate import main, plan
from megatron_klear.config.evaluation import EvaluationConfig
from megatron_klear.config.read import load
from megatron_klear.data.rows import DataError
from megatron_klear.data.tiny import TinyShape, write_tiny_model
from megatron_klear.errors import UserError
from megatron_klear.evaluation.benchmarks import read_benchmark
from megatron_klear.evaluation.run import evaluate
from megatron_klear.evaluation.sampling import LocalSource
from megatron_klear.evaluation.store import Response
from megatron_klear.evaluation.table import markdown


class Oracle:
    """Says the right answer to every problem as often as its number allows, and something else otherwise."""

    def __init__(self, share=0.6):
        self.share, self.drawn = share, 0

    def check(self, problems, protocol):
        """Nothing is refused."""

    def draw(self, wanted, protocol, seed, drawn):
        for one in wanted:
            drawn([self.response(one.problem, number, seed) for number in one.numbers])
            self.drawn += len(one.numbers)

    def response(self, problem, number, seed):
        rng = random.Random(f"{problem.id} {number} {seed}")
        answer = problem.ground_truth if rng.random() < self.share else str(rng.randrange(3))
        text = f"<think>\nhm\n</think>\n\nThe answer is \\boxed{{{answer}}}."
        finish = "stop" if rng.random() < 0.9 else "length"
        return Response(problem=problem.id, number=number, text=text, finish=finish, num_tokens=rng.randrange(9, 99))

    def opening(self, problem):
        return ""

    def extension(self):
        return ""

    def identity(self):
        return {"model": "oracle"}


def problems_file(tmp_path, count=12):
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"What is {n} + 7?", "answer": f"{n + 7}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp_path, output, **more):
    values = {
        "output": output,
        "model": {"path": tmp_path},
        "benchmarks": [{"name": "amc", "files": [str(problems_file(tmp_path))], "samples": 4}],
        "reward": {"require_thinking": False, "workers": 1, "timeout_seconds": 60},
    }
    return EvaluationConfig.model_validate(values | more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation that nobody stopped: its settings' folder, its folder, its result."""
    folder = tmp_path_factory.mktemp("evaluation")
    (result,) = evaluate(settings(folder, folder / "whole"), Oracle)
    return folder, folder / "whole" / "amc", result


def test_the_table_counts_what_was_said(finished):
    _, folder, result = finished
    responses = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()[1:]]
    right = sum(int(r["text"].partition("boxed{")[2].partition("}")[0]) in range(7, 19) for r in responses)
    assert len(responses) == 48
    assert result.accuracy == right / 48 == sum(result.right.values()) / 48
    assert result.low <= result.accuracy <= result.high
    assert result.pass_at[1] == pytest.approx(result.accuracy)
    assert result.pass_at[4] == sum(count > 0 for count in result.right.values()) / 12
    assert result.majority >= result.accuracy - 0.2
    assert result.cut_off == sum(r["finish"] == "length" for r in responses) / 48
    assert f"{100 * result.accuracy:.1f}" in markdown([result])


def test_stopped_at_any_byte_it_ends_the_same(finished, tmp_path):
    """Files cut at twenty places, as a kill leaves them, in the middle of lines and of characters too."""
    folder, whole, result = finished
    rng = random.Random(0)
    for attempt in range(20):
        output = tmp_path / str(attempt)
        (output / "amc").mkdir(parents=True)
        kept = 0
        for name in ("responses.jsonl", "grades.jsonl"):
            content = (whole / name).read_bytes()
            cut = rng.randrange(len(content) + 1) if name == "responses.jsonl" or kept == len(content) else 0
            (output / "amc" / name).write_bytes(content[:cut])
            kept = cut
        source = Oracle()
        (again,) = evaluate(settings(folder, output), lambda source=source: source)
        assert again == result
        for name in ("responses.jsonl", "grades.jsonl"):
            assert sorted((output / "amc" / name).read_text().splitlines()) == sorted(
                (whole / name).read_text().splitlines()
            )
        assert source.drawn < 48 or kept == 0


def test_the_page_holds_every_response_as_text(finished):
    _, whole, result = finished
    page = (whole.parent / "report.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert len(data) == 1
    assert len(data[0]["responses"]) == data[0]["total"] == 48
    assert {one["verdict"] for one in data[0]["responses"]} <= {"right", "wrong", "malformed"}
    assert page.count("<rect") == 48
    assert f"{100 * result.accuracy:.1f}" in page
    assert "@@" not in page
    assert "http" not in page.partition('id="data">')[0].replace("http-equiv", "")


class Injector(Oracle):
    def response(self, problem, number, seed):
        text = "</script><script>alert(1)</script> @@BODY@@ \\boxed{1}"
        return Response(problem=problem.id, number=number, text=text, finish="stop", num_tokens=5)


def test_a_response_is_never_markup(tmp_path):
    config = settings(tmp_path, tmp_path / "out")
    evaluate(config, Injector)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "alert(1)</script>" not in page
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data[0]["responses"][0]["text"].startswith("</script><script>alert(1)</script> @@BODY@@")


def test_two_models_are_compared_on_the_same_problems(finished, tmp_path, capsys):
    folder, _, before = finished
    (after,) = evaluate(settings(folder, folder / "better"), lambda: Oracle(share=0.95))
    main(["--compare", str(folder / "whole"), str(folder / "better")])
    line = capsys.readouterr().out.splitlines()[2]
    gain = 100 * (after.accuracy - before.accuracy)
    figures = f"{100 * before.accuracy:.1f} | better | {100 * after.accuracy:.1f} | {gain:+.1f} [+"
    assert f"| amc, 12 problems | {figures}" in line
    evaluate(settings(folder, folder / "greedy", protocol="greedy"), Oracle)
    main(["--compare", str(folder / "whole"), str(folder / "better"), str(folder / "greedy")])
    *_, blank, told = capsys.readouterr().out.splitlines()
    assert blank == ""
    assert told.startswith("- amc was drawn otherwise: whole avg@4, temperature 0.6")
    assert "; greedy avg@4, temperature 0," in told
    other = tmp_path / "whole"
    shutil.copytree(folder / "better", other)
    main(["--compare", str(folder / "whole"), str(other)])
    assert f" | {other} | {100 * after.accuracy:.1f} | " in capsys.readouterr().out  # two folders of one name
    (other / "amc" / "result.json").write_text('{"name": "amc", "samples": 0, "right": {}}')
    with pytest.raises(SystemExit):
        main(["--compare", str(folder / "whole"), str(other)])
    assert "cannot be read" in capsys.readouterr().err
    shutil.rmtree(other)
    for wrong in ([str(folder / "whole")], [str(folder / "whole"), str(tmp_path)]):
        with pytest.raises(SystemExit):
            main(["--compare", *wrong])
        assert "--compare takes two" in (told := capsys.readouterr().err) or "is no evaluation" in told


def test_a_finished_evaluation_draws_nothing_more(finished):
    folder, whole, result = finished
    before = (whole / "responses.jsonl").read_bytes()

    class Silent(Oracle):
        def draw(self, *_):
            pytest.fail("everything was there")

    assert evaluate(settings(folder, folder / "whole"), Silent) == [result]
    assert (whole / "responses.jsonl").read_bytes() == before


def test_responses_drawn_anew_are_graded_anew(tmp_path):
    """Grades stay where their responses are removed; with another model behind the same name they say nothing."""
    evaluate(settings(tmp_path, tmp_path / "out"), lambda: Oracle(share=1.0))
    (tmp_path / "out/amc/responses.jsonl").unlink()
    (again,) = evaluate(settings(tmp_path, tmp_path / "out"), lambda: Oracle(share=0.0))
    (fresh,) = evaluate(settings(tmp_path, tmp_path / "fresh"), lambda: Oracle(share=0.0))
    assert again == fresh


def test_two_evaluations_do_not_write_to_one_folder(tmp_path):
    config = settings(tmp_path, tmp_path / "out")

    class Meanwhile(Oracle):
        def draw(self, *arguments):
            with pytest.raises(UserError, match="another evaluation writes to it"):
                evaluate(config, Oracle)
            super().draw(*arguments)

    (result,) = evaluate(config, Meanwhile)
    assert len((tmp_path / "out/amc/responses.jsonl").read_text().splitlines()) == 49
    assert result.num_problems == 12


def test_what_cannot_be_drawn_is_told_before_anything_is(tmp_path):
    """The second benchmark has a prompt beyond the model's positions."""
    model = write_tiny_model(tmp_path / "model", "qwen3", TinyShape(max_positions=96))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"problem": "1 + " * 96 + "1?", "answer": "97"}) + "\n")
    benchmarks = [{"name": "amc", "files": [str(problems_file(tmp_path))]}, {"name": "minerva", "files": [str(long)]}]
    config = settings(
        tmp_path, tmp_path / "out", benchmarks=benchmarks, model={"path": model}, sampling={"max_tokens": 4}
    )
    with pytest.raises(UserError, match=r"long.jsonl:1: a prompt of \d+ tokens and a response of 4 go beyond .* 96"):
        evaluate(config, lambda: LocalSource(config.model, None))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="repetition penalty"):
        plan(config.model_copy(update={"protocol": "released"}))
    with pytest.raises(UserError, match="amc: a prompt and a response of 96 go beyond the model's 96 positions"):
        plan(config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_tokens": 96})}))
    assert "120 tokens" in plan(
        config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_tokens": 120}), "long": 120})
    )
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        plan(config.model_copy(update={"model": config.model.model_copy(update={"path": tmp_path / "none"})}))


def test_a_local_model_is_known_by_its_precision_and_what_its_prompts_are_made_of(tmp_path):
    folder = write_tiny_model(tmp_path / "model", "qwen3", TinyShape(num_layers=1))

    def identity(**more):
        config = settings(tmp_path, tmp_path / "out", model={"path": folder, "device": "cpu", **more})
        return LocalSource(config.model, None).identity()

    first = identity()
    assert identity() == first
    assert {key for key, value in identity(dtype="fp32").items() if value != first[key]} == {"dtype"}
    template = folder / "chat_template.jinja"
    template.write_text("Hello. " + template.read_text())
    assert {key for key, value in identity().items() if value != first[key]} == {"files"}


@pytest.mark.parametrize(
    ("name", "key"), [("amc", "since"), ("mine", "until"), ("mine", "subset"), ("livecodebench_v5", "subset")]
)
def test_a_choice_that_nothing_could_heed_is_refused(tmp_path, name, key):
    benchmark = {"name": name, "files": [str(problems_file(tmp_path))], key: "2024-01-01"}
    with pytest.raises(DataError, match=f"nothing that `{key}` could choose by"):
        read_benchmark(settings(tmp_path, tmp_path / "out", benchmarks=[benchmark]).benchmarks[0])


def test_another_evaluation_does_not_go_on_there(finished):
    folder, _, _ = finished
    with pytest.raises(UserError, match=r"another evaluation: seed was 0 and is 1"):
        evaluate(settings(folder, folder / "whole", seed=1), Oracle)
    with pytest.raises(UserError, match=r"sampling was .* and is"):
        evaluate(settings(folder, folder / "whole", protocol="qwen"), Oracle)


def test_what_cannot_be_gone_on_with_is_told_before_anything_is_drawn(tmp_path):
    benchmark = {"files": [str(problems_file(tmp_path))], "samples": 1}
    two = [{"name": "amc", **benchmark}, {"name": "minerva", **benchmark}]
    evaluate(settings(tmp_path, tmp_path / "out", benchmarks=[two[1]]), Oracle)
    oracle = Oracle()
    with pytest.raises(UserError, match=r"minerva/responses.jsonl is of another evaluation: seed was 0 and is 1"):
        evaluate(settings(tmp_path, tmp_path / "out", benchmarks=two, seed=1), lambda: oracle)
    other = {"require_thinking": True, "workers": 1, "timeout_seconds": 60}
    with pytest.raises(UserError, match=r"minerva/grades.jsonl is of another evaluation: reward was"):
        evaluate(settings(tmp_path, tmp_path / "out", benchmarks=two, reward=other), lambda: oracle)
    assert oracle.drawn == 0
    assert not (tmp_path / "out" / "amc").exists()


def test_a_packed_file_is_read_as_the_file_in_it(tmp_path):
    plain = problems_file(tmp_path)
    packed = plain.with_name("sums.jsonl.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))

    def read(path):
        benchmark = {"name": "amc", "files": [str(path)]}
        return read_benchmark(settings(tmp_path, tmp_path / "out", benchmarks=[benchmark]).benchmarks[0])

    assert [problem.id for problem in read(packed)] == [problem.id for problem in read(plain)]
    for broken in (packed.read_bytes()[:-9], b"no gzip"):
        packed.write_bytes(broken)
        with pytest.raises(DataError, match=r"sums.jsonl.gz cannot be unpacked"):
            read(packed)


def test_an_output_that_is_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"sums.jsonl is no folder"):
        evaluate(settings(tmp_path, tmp_path / "sums.jsonl"), lambda: pytest.fail("no model is loaded"))


@pytest.mark.parametrize("taken", ["amc", "amc/responses.jsonl/folder"])
def test_a_place_that_something_else_has_is_refused(tmp_path, taken):
    place = tmp_path / "out" / taken
    place.parent.mkdir(parents=True)
    place.touch()
    oracle = Oracle()
    with pytest.raises(UserError, match=r"out/amc/responses.jsonl cannot be written"):
        evaluate(settings(tmp_path, tmp_path / "out"), lambda: oracle)
    assert oracle.drawn == 0


def test_a_folder_is_of_one_model(tmp_path):
    """Also where the other model answered another benchmark."""
    evaluate(settings(tmp_path, tmp_path / "out"), Oracle)
    other = {"name": "minerva", "files": [str(problems_file(tmp_path))], "samples": 1}

    class Another(Oracle):
        def identity(self):
            return {"model": "another"}

    config = settings(tmp_path, tmp_path / "out", benchmarks=[other])
    with pytest.raises(UserError, match=r"amc/responses.jsonl is of another model: model was oracle and is another"):
        evaluate(config, Another)
    assert not (tmp_path / "out" / "minerva").exists()
    (result,) = evaluate(config, Oracle)
    assert result.name == "minerva"


def test_a_damaged_line_is_named(finished, tmp_path):
    folder, whole, _ = finished
    (tmp_path / "amc").mkdir()
    content = (whole / "responses.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "amc" / "responses.jsonl").write_text("".join([*content[:3], '{"problem": 1}\n', *content[3:]]))
    with pytest.raises(UserError, match=r"responses.jsonl:4 is no response"):
        evaluate(settings(folder, tmp_path), Oracle)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": "?"}, "no `answer`"),
        ({"answer": "4"}, "no `problem`"),
        ({"problem": "?", "answer": []}, "no `answer`"),
        ({"problem": "?", "answer": float("nan")}, "no `answer`"),
        ({"problem": "?", "answer": [["4"]]}, "no `answer`"),
        ({"problem": "?", "answer": "so much: ####"}, "no `answer`"),
        ({"messages": [{"role": "system", "content": "Be brief."}], "answer": "4"}, "no `problem`"),
        ([1], "no object"),
        ({"problem": "?", "answer": "it depends"}, None),
    ],
)
def test_bad_rows_are_named_before_anything_is_drawn(tmp_path, row, words):
    config = settings(tmp_path, tmp_path / "out")
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    if words is None:
        assert len(read_benchmark(config.benchmarks[0])) == 13
        return
    with pytest.raises(DataError, match=rf"sums.jsonl:13: .*{words}"):
        evaluate(config, lambda: pytest.fail("no model is loaded"))


def test_settings_that_contradict_themselves_are_refused(tmp_path):
    benchmark = {"name": "amc", "files": ["x"]}
    for values, words in (
        ({"benchmarks": [benchmark]}, "model.path"),
        (
            {"benchmarks": [benchmark], "model": {"path": "m"}, "endpoint": {"urls": ["http://u"], "model": "m"}},
            "model.path",
        ),
        ({"benchmarks": [benchmark], "endpoint": {"urls": ["http://u"]}}, "endpoint.model"),
        *(
            ({"benchmarks": [benchmark], "endpoint": {"urls": [url], "model": "m"}}, "expected a base address")
            for url in ("", "127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/chat/completions/")
        ),
        ({"benchmarks": [benchmark, benchmark], "model": {"path": "m"}}, "twice"),
        ({"benchmarks": [], "model": {"path": "m"}}, "empty"),
        *(
            ({"benchmarks": [benchmark | {"name": name}], "model": {"path": "m"}}, "cannot be its folder's")
            for name in ("", "..", "../x", "a/b", "/x", "long_model")
        ),
    ):
        with pytest.raises(ValueError, match=words):
            EvaluationConfig.model_validate({"output": tmp_path, **values})


def test_the_commands_of_the_help_have_valid_settings(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    shown = [
        line.partition("  #")[0] for line in command.__doc__.splitlines() if line.startswith("klear evaluate --config")
    ]
    loaded = [load(EvaluationConfig, shlex.split(line)[2:]) for line in shown]
    assert 65536 in [settings.long for settings in loaded]
