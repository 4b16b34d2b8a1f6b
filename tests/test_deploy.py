"""The deployment file: the overview page's excerpt as it stands there, what overrides what, and every mistake named."""

import pytest

import runtime_loop
from nano_atlas.config import parse
from nano_atlas.errors import UserError
from nano_atlas.presets import presets
from nano_atlas.runtime.deploy import read_deployment, shared, with_deployment, write_deployment

EXCERPT = """# atlas-sdk runtime config excerpt
teacher:
  llm:
    provider: huggingface
    model: /models/atlas-teacher-grpo
    temperature: 0.2
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deploy.yaml"
    path.write_text(EXCERPT)
    return path


def test_the_excerpt_of_the_overview_page_works_and_flags_override_it(file):
    argv = with_deployment([f"--deploy={file}", "--student", "s"])
    assert argv[:2] == ["--teacher", "/models/atlas-teacher-grpo"]
    config = parse(runtime_loop.Config, argv, presets("runtime_loop"), "")
    assert (config.teacher, config.temperature) == ("/models/atlas-teacher-grpo", (0.7, 0.2))
    assert (config.student, config.deploy) == ("s", file)
    argv = with_deployment(["--temperature", "0", "0.9", "--deploy", str(file)])
    assert parse(runtime_loop.Config, argv, presets("runtime_loop"), "").temperature == (0.0, 0.9)
    assert with_deployment(["--student", "s"]) == ["--student", "s"]


def test_the_evaluation_reads_the_same_file(file):
    import eval as evaluation

    argv = with_deployment(["--deploy", str(file)], is_evaluation=True)
    config = parse(evaluation.Config, argv, presets("eval"), "")
    assert config.teachers == {"deployed": "/models/atlas-teacher-grpo"} and config.temperature == 0.0


@pytest.mark.parametrize(
    ("llm", "flags"),
    [
        (
            "{provider: openai, api_base: 'http://h:1', model: m, max_output_tokens: 9}",
            ["--student", "http://h:1#m", "--answer-tokens", "9"],
        ),
        ("{provider: openai, api_base: 'http://h:1'}", ["--student", "http://h:1"]),
        ("{provider: http, model: 'http://h/run#text'}", ["--student", "post+http://h/run#text"]),
        (
            "{provider: python, model: 'mine:agent', temperature: 0}",
            ["--student", "mine:agent", "--temperature", "0", "0.7"],
        ),
    ],
)
def test_every_provider(file, llm, flags):
    file.write_text(f"student:\n  llm: {llm}\n")
    assert with_deployment(["--deploy", str(file)])[: len(flags)] == flags


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("teacher: [", "ParserError"),
        ("teacher:\n", "not a deployment file"),
        ("", "not a deployment file"),
        ("teacher: {model: m}", "KeyError: 'llm'"),
        ("judge: {llm: {provider: python, model: m}}", "judge: .*is unknown"),
        ("teacher: {llm: {provider: python, model: m, temprature: 1}}", "teacher: .*temprature.* is unknown"),
        ("teacher: {llm: {provider: xai, model: m}}", "teacher: .*xai .* is unknown"),
        ("teacher: {llm: {provider: huggingface}}", "KeyError: 'model'"),
        ("teacher: {llm: {provider: python, model: 2026-13-45}}", "ValueError: month"),
        ("[" * 5_000, "RecursionError"),
        ("teacher: {llm: {[provider]: python}}", "ConstructorError"),
        ("teacher: {llm: {provider: [python]}}", "TypeError"),
        ("teacher: {llm: {provider: http, model: m, api_base: u}}", "teacher: .*api_base.* is unknown"),
    ],
)
def test_mistakes_are_named_with_their_place(file, text, complaint):
    file.write_text(text)
    with pytest.raises(UserError, match=f"deploy.yaml.*{complaint}"):
        read_deployment(file)


def test_a_promoted_teacher_takes_the_place_of_the_old_one_alone(file):
    file.write_text(EXCERPT + "student: {llm: {provider: python, model: 'mine:agent'}}\n")
    write_deployment(file, "runs/new/model")
    seats = read_deployment(file)
    assert {name: seat["spec"] for name, seat in seats.items()} == {
        "teacher": "runs/new/model",
        "student": "mine:agent",
    }
    assert "temperature" not in seats["teacher"]


def test_an_address_beyond_this_machine_needs_a_key(monkeypatch):
    monkeypatch.delenv("NANO_ATLAS_API_KEY", raising=False)
    runtime_loop.Config(student="s", teacher="t", serve="0").check()
    with pytest.raises(UserError, match="NANO_ATLAS_API_KEY"):
        runtime_loop.Config(student="s", teacher="t", serve="0.0.0.0:0").check()
    monkeypatch.setenv("NANO_ATLAS_API_KEY", "s3cret")
    runtime_loop.Config(student="s", teacher="t", serve="0.0.0.0:0").check()


def test_what_a_greedy_runtime_exports_is_trained_on_with_samples():
    config = parse(runtime_loop.Config, ["--temperature", "0", "0.9"], presets("runtime_loop"), "")
    assert shared(vars(config))["temperature"] == (0.0, 0.9)
    greedy = parse(runtime_loop.Config, ["--temperature", "0.5", "0"], presets("runtime_loop"), "")
    assert shared(vars(config)).keys() - shared(vars(greedy)).keys() == {"temperature"}
