"""What other programs are given to run an export: Ollama's template says what
the jinja template says, vLLM's notes are true."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.core.problems import Refusal
from engine.export import ollama, vllm_command
from engine.export.export_spec import ExportSpec
from engine.export.ollama import message
from engine.runs.lineage import adapts_vision
from engine.spec.run_spec import RunSpec
from engine.worker.templates.chat_template import render
from tests import families

GO = shutil.which("go")
EXPRESSED = ("chatml", "qwen2_5", "llama3", "gemma", "mistral", "phi3", "plain", "alpaca")
USER = 'Who {{ are }} "you"? 你好'
TALK = [
    message("user", USER),
    message("assistant", "I am\n\n'Athanor'."),
    message("user", "And now?"),
    message("assistant", "Still."),
    message("user", "Bye"),
]
SYSTEM = message("system", "Be brief.")


def renderer(name: str) -> Callable[..., str]:
    tokenizer, template = families.tokenizer(name), families.template(name)

    def rendered(messages: list[dict[str, str]], generate: bool) -> str:
        return render(tokenizer, template, messages, add_generation_prompt=generate)[0]

    return rendered


def conversations(system: bool) -> list[list[dict[str, str]]]:
    plain = [TALK[:1], TALK[:3], TALK]
    return plain + ([[SYSTEM, *one] for one in plain] if system else [])


def go(template: str, wanted: list[list[dict[str, str]]]) -> list[str]:
    """The conversations as Go's own text/template writes them, given what Ollama gives it."""
    asked = json.dumps({"template": template, "conversations": wanted})
    script = Path(__file__).with_name("go_render.go")
    done = subprocess.run([GO, "run", script], input=asked, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPRESSED)
def test_the_pieces_write_what_the_template_writes(name: str) -> None:
    rendered = renderer(name)
    found = ollama.template_pieces(rendered)
    for conversation in conversations(found.system is not None):
        assert ollama.render_pieces(found, conversation) == rendered(conversation, True)


@pytest.mark.slow
@pytest.mark.skipif(not GO, reason="Go is not installed: only its own text/template can tell")
@pytest.mark.parametrize("name", EXPRESSED)
def test_go_writes_what_jinja_writes(name: str) -> None:
    rendered = renderer(name)
    found = ollama.template_pieces(rendered)
    wanted = conversations(found.system is not None)
    assert go(ollama.go_template(found), wanted) == [rendered(one, True) for one in wanted]


@pytest.mark.slow
@pytest.mark.skipif(not GO, reason="Go is not installed: only its own text/template can tell")
def test_braces_and_quotes_of_a_template_stay_text() -> None:
    odd = ollama.TemplatePieces('\n{{"""', "}}", "{{ else }}", '"""|', ("<<{{", "}}>>\n"))
    wanted = conversations(True)
    assert go(ollama.go_template(odd), wanted) == [ollama.render_pieces(odd, one) for one in wanted]
    assert '"""' not in ollama.go_template(odd)


def test_a_late_system_message_stands_before_the_last_question() -> None:
    found = ollama.template_pieces(renderer("mistral"))
    assert found.late
    assert ollama.render_pieces(found, [SYSTEM, *TALK[:3]]).endswith("[INST] Be brief.\n\nAnd now? [/INST]")


def test_a_first_token_that_the_model_adds_itself_is_left_out() -> None:
    rendered = renderer("llama3")
    bos = families.tokenizer("llama3").bos_token
    assert rendered(TALK[:1], True).startswith(bos)
    assert not ollama.template_pieces(rendered, bos).head.startswith(bos)


def test_a_template_that_counts_its_turns_is_refused() -> None:
    def counting(messages: list[dict[str, str]], _generate: bool) -> str:
        return "".join(f"<{number}>{one['content']}" for number, one in enumerate(messages))

    with pytest.raises(Refusal, match="does more than add text around turns"):
        ollama.template_pieces(counting)


def test_a_template_that_fails_says_why() -> None:
    def failing(_messages: list[dict[str, str]], _generate: bool) -> str:
        raise ValueError("no users here")

    with pytest.raises(Refusal, match="no users here"):
        ollama.template_pieces(failing)


def test_what_go_cannot_do_is_told() -> None:
    told = {one.code for one in ollama.template_warnings(renderer("gemma"), families.template("gemma"))}
    assert "ollama-trims" in told
    told = {one.code for one in ollama.template_warnings(renderer("qwen3"), families.template("qwen3"))}
    assert told >= {"ollama-forgets-thoughts", "ollama-tools"}
    assert ollama.template_warnings(renderer("plain"), families.template("plain")) == []


def test_a_modelfile_names_source_template_and_stops() -> None:
    text = ollama.modelfile("/models/base", "{{ .System }}", ["</s>", 'a"b'], adapter=".", context=100_000)
    assert "FROM /models/base\nADAPTER .\n" in text
    assert 'TEMPLATE """{{ .System }}"""' in text
    assert re.findall("PARAMETER (.*)", text) == ['stop "</s>"', "num_ctx 32768"]


LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "bias": "none"}


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        ({"use_dora": True}, ["vllm-dora"]),
        ({"modules_to_save": ["lm_head"]}, ["vllm-whole-modules"]),
        ({"r": 600}, ["vllm-rank"]),
        ({"rank_pattern": {"q_proj": 4}}, ["vllm-patterns"]),
        ({"target_modules": ["q_proj", "model.embed_tokens"]}, ["vllm-embeddings"]),
    ],
)
def test_vllm_is_told_what_it_would_refuse(changes: dict, codes: list[str]) -> None:
    assert [one.code for one in vllm_command.adapter_problems(LORA | changes)] == codes


def test_vllm_is_told_that_it_would_ignore_adapters_on_vision_parts(tmp_path: Path) -> None:
    assert [issue.code for issue in vllm_command.adapter_problems(LORA, on_vision=True)] == ["vllm-vision"]
    specs = {
        "plain": RunSpec.read({}),
        "tower": RunSpec.read({"vision": {"tower": "adapter"}}),
        "continued": RunSpec.read({"model": {"adapter_path": str(tmp_path / "tower" / "adapter")}}),
        "whole": RunSpec.read({"vision": {"tower": "trained"}}),
        "combined": ExportSpec.read({"adapters": {str(tmp_path / "continued" / "adapter"): 1.0}}),
        "itself": RunSpec.read({"model": {"adapter_path": str(tmp_path / "itself" / "adapter")}}),
    }
    for name, spec in specs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.yaml").write_text(spec.to_yaml())
    ignored = [name for name in specs if adapts_vision(tmp_path / name / "adapter")]
    assert ignored == ["tower", "continued", "combined"]


def test_vllm_gets_the_smallest_rank_that_it_takes(tmp_path: Path) -> None:
    assert "--max-lora-rank" not in vllm_command.serve_command(tmp_path, "x", "/base", LORA)
    told = vllm_command.serve_command(tmp_path, "x", "/base", LORA | {"r": 130})
    assert told == f"vllm serve /base --enable-lora --lora-modules x={tmp_path} --max-lora-rank 256"
    assert vllm_command.serve_command(tmp_path / "a b", "x") == f"vllm serve '{tmp_path}/a b' --served-model-name x"
