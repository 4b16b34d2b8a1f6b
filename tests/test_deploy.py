"""The deployment file: the overview page's excerpt as it stands there, what overrides what, and every mistake named."""

import pytest

import eval as evaluation
import runtime_loop
from nano_atlas import world
from nano_atlas.config import Preset, parse
from nano_atlas.errors import UserError
from nano_atlas.runtime.deploy import (
    Deployed,
    evaluation_options,
    read_deployment,
    with_deployment,
    write_deployment,
)

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


def config_of(*argv):
    return parse(runtime_loop.Config, argv, with_deployment(runtime_loop.PRESETS, argv), "")


def test_the_excerpt_of_the_overview_page_works_as_it_stands(file):
    assert read_deployment(file) == {"teacher": Deployed("/models/atlas-teacher-grpo", None, 0.2, None)}
    config = config_of("--deploy", str(file))
    assert (config.teacher, config.teacher_temperature, config.student) == (
        "/models/atlas-teacher-grpo",
        0.2,
        str(world.STUDENT),
    )


def test_flags_override_the_file_and_the_file_the_preset(file):
    assert config_of(f"--deploy={file}", "--teacher-temperature", "0.9").teacher_temperature == 0.9
    assert (
        config_of("--preset", "own", "--deploy", str(file), "--tasks", "t", "--student", "s").teacher
        == "/models/atlas-teacher-grpo"
    )
    assert with_deployment({"p": Preset("", {"teacher": "x"})}, [])["p"].overrides == {"teacher": "x"}


def test_the_evaluation_reads_the_same_file(file):
    argv = ["--deploy", str(file)]
    config = parse(evaluation.Config, argv, with_deployment(evaluation.PRESETS, argv, evaluation_options), "")
    assert config.teachers == {"deployed": "/models/atlas-teacher-grpo"} and config.temperature == 0.0


@pytest.mark.parametrize(
    ("llm", "spec"),
    [
        (
            "{provider: openai, api_base: 'http://h:1', model: m, max_output_tokens: 9}",
            Deployed("http://h:1", "m", None, 9),
        ),
        ("{provider: http, model: 'http://h/run#text'}", Deployed("post+http://h/run#text")),
        ("{provider: python, model: 'mine:agent'}", Deployed("mine:agent")),
    ],
)
def test_every_provider(file, llm, spec):
    file.write_text(f"student:\n  llm: {llm}\n")
    assert read_deployment(file) == {"student": spec}
    if spec.max_output_tokens:
        config = config_of("--deploy", str(file))
        assert (config.student, config.student_model, config.answer_tokens) == ("http://h:1", "m", 9)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("teacher: [", "not YAML"),
        ("teacher:\n", "must be a section"),
        ("", "must be a section"),
        ("judge: {llm: {}}", "judge: unknown; there are student, teacher"),
        (
            "teacher: {llm: {provider: huggingface, model: m, temprature: 1}}",
            r"teacher\.llm\.temprature: unknown",
        ),
        ("teacher: {llm: {provider: xai, model: m}}", "'xai' is unknown"),
        ("teacher: {llm: {provider: huggingface}}", "model: provider huggingface needs it"),
        ("teacher: {llm: {provider: huggingface, model: m, api_base: u}}", "belongs to provider openai"),
        ("teacher: {llm: {provider: huggingface, model: m, temperature: hot}}", "'hot' is not a number"),
    ],
)
def test_mistakes_are_named_with_their_place(file, text, complaint):
    file.write_text(text)
    with pytest.raises(UserError, match=f"deploy.yaml.*{complaint}"):
        read_deployment(file)


def test_a_promoted_teacher_takes_the_place_of_the_old_one_alone(file):
    file.write_text(EXCERPT + "student: {llm: {provider: python, model: 'mine:agent'}}\n")
    write_deployment(file, "runs/new/model")
    assert read_deployment(file) == {"teacher": Deployed("runs/new/model"), "student": Deployed("mine:agent")}
