"""vLLM behind the server: the same voices, asked by the same client, give the answers that transformers gives.

vLLM needs a card, which this machine lacks. `tests/stand_in_vllm.py` stands for its program:
it takes the words and requests of vLLM 0.33 and no others, with the real weights behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import psutil
import pytest

from engine.core import hardware, leases
from engine.core.problems import Refusal
from engine.core.rundir import write_json
from engine.export.vllm_command import MAX_LORA_RANKS
from engine.launch.processes import find_processes
from engine.launch.workspace import PROJECT, Workplace
from engine.serving import chat_client, server_process, servers, vllm
from tests.conftest import flags_of, wait_until
from tests.served import client_of, serving
from tests.test_serve import BASE, ON_AND_ON, ONE, QUESTIONS, TWO, ask, said

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, demo_results: Path) -> Workplace:
    """A workplace with two finished runs of the demo model."""
    return Workplace(saves=shutil.copytree(demo_results, tmp_path_factory.mktemp("vllm") / "saves"))


@pytest.fixture(scope="module")
def program(vllm_path: str) -> Iterator[None]:
    """A command vllm on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", vllm_path)
        yield


@pytest.fixture(scope="module")
def server(trained: Workplace, program: None) -> Iterator[servers.Server]:
    with serving(trained, servers.choose(trained, "", [ONE], "vllm")) as started:
        yield started


@pytest.fixture
def client(server: servers.Server) -> openai.OpenAI:
    return client_of(server)


@pytest.mark.slow
def test_every_voice_says_what_it_says_with_transformers(
    trained: Workplace,
    server: servers.Server,
    client: openai.OpenAI,
    tmp_path: Path,
) -> None:
    assert server.settings["vllm"]["command"] == [vllm.program()]
    choice = servers.choose(trained, "", [ONE, TWO])
    # Found, and so unloaded, whatever engine is chosen.
    assert servers.find(trained.saves, choice).path == server.path
    with pytest.raises(Refusal, match=r"demo_model is loaded with vllm\. Unload it first"):
        servers.start(trained, choice)
    plain = servers.Server(tmp_path / "plain")
    server_process.begin(plain, servers.serve_settings(trained, choice, ""), "key")
    servers.wait(plain)
    chat_client.add(server, choice.adapters)  # the second adapter, while it serves
    assert [one["id"] for one in chat_client.served_models(server)] == [BASE, ONE, TWO]
    for settings in (
        {"temperature": 0, "max_tokens": 40},
        {"temperature": 0, "max_tokens": 40, "stop": ["o"]},
    ):
        asked = {voice: said(QUESTIONS[0]) for voice in (BASE, ONE, TWO)}
        *_, here = chat_client.ask(plain, asked, settings)
        *_, there = chat_client.ask(server, asked, settings)
        assert [one.problem for one in there] == [None] * 3, (server.path / "vllm.log").read_text(encoding="utf-8")
        assert [(one.text, one.finish, one.tokens) for one in there] == [
            (one.text, one.finish, one.tokens) for one in here
        ]
        assert len({one.text for one in there}) == 3 or "stop" in settings
    servers.end(plain)
    told = ask(client, ONE, QUESTIONS[0], max_tokens=5, logprobs=True, top_logprobs=2)
    assert told.usage.completion_tokens == len(told.choices[0].logprobs.content)
    for one in told.choices[0].logprobs.content:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob == one.logprob
    # A control token in a question stays text: the prompt goes as tokens.
    plain_prompt = ask(client, BASE, "a b", max_tokens=1).usage.prompt_tokens
    assert ask(client, BASE, "a<|im_end|> b", max_tokens=1).usage.prompt_tokens > plain_prompt + 2


@pytest.mark.slow
def test_a_stopped_answer_is_aborted_and_what_vllm_cannot_do_is_a_sentence(
    trained: Workplace,
    server: servers.Server,
    tmp_path: Path,
) -> None:
    stopped = False
    for now in chat_client.ask(server, {ONE: said(QUESTIONS[0])}, {"temperature": 0, "request_id": "me", **ON_AND_ON}):
        if not stopped and len(now[0].text) > 10:
            chat_client.cancel(server, "me")
            stopped = True
    assert now[0].finish == "cancelled"
    wait_until(lambda: b"aborted after" in (server.path / "vllm.log").read_bytes())
    with pytest.raises(Refusal, match="reward model cannot run alongside vLLM"):
        chat_client._call(server, "POST", "/v1/score", {"judge": "/x", "conversations": [said("x")]})
    # Adapters that vLLM would take as something else, or not at all.
    config = json.loads((trained.saves / ONE / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    for name, change, match in (
        ("whole", {"modules_to_save": ["lm_head"]}, "cannot load 'whole' as an adapter"),
        ("wide", {"r": 64}, "has rank 64, but vLLM was started with a maximum rank of 16"),
    ):
        folder = trained.saves / name / "adapter"
        folder.mkdir(parents=True)
        for file in (trained.saves / ONE / "adapter").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        write_json(folder / "adapter_config.json", config | change)
        with pytest.raises(Refusal, match=match):
            chat_client.add(server, {name: folder})


@pytest.mark.slow
def test_an_answer_is_stopped_that_has_no_token_yet(server: servers.Server) -> None:
    inner, pool = _inner(server.path), ThreadPoolExecutor(1)
    inner.suspend()  # as one that reads a prompt for very long
    try:
        asked = chat_client.ask(server, {BASE: said(QUESTIONS[0])}, {"request_id": "early"})
        told = pool.submit(lambda: list(asked))
        wait_until(lambda: chat_client._call(server, "GET", "/health")["answering"] == 1)
        chat_client.cancel(server, "early")
        [last] = told.result(120)[-1]
    finally:
        inner.resume()
        pool.shutdown()
    assert (last.finish, last.text, last.problem) == ("cancelled", "", None)


@pytest.mark.slow
def test_adapters_that_are_taken_in_at_once_keep_apart(trained: Workplace, server: servers.Server) -> None:
    folders = {f"copy{n}": trained.saves / f"copy{n}" / "adapter" for n in range(4)}
    for folder in folders.values():
        shutil.copytree(trained.saves / TWO / "adapter", folder)
    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(lambda one: chat_client.add(server, dict([one])), folders.items()))
    assert {one["id"] for one in chat_client.served_models(server)} >= folders.keys()


@pytest.mark.slow
def test_vllm_ends_with_its_server_and_its_last_words_are_told(
    trained: Workplace,
    program: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [
        sys.executable,
        "-m",
        "engine",
        "serve",
        ONE,
        "--port",
        "0",
        "--engine",
        "vllm",
        *flags_of(trained),
    ]

    def begun() -> tuple[subprocess.Popen[str], Path]:
        serving = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        next(line for line in serving.stdout if line.startswith("serving"))
        [server] = [one for one in servers.servers(trained.saves) if one.settings.get("shell")]
        return serving, server.path

    serving, folder = begun()
    assert len(find_processes(folder)) == 3
    # Ctrl-C reaches the group of the server; vLLM has a group of its own, and is ended by the server.
    assert os.getpgid(_inner(folder).pid) == _inner(folder).pid
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(120) == 0
    assert find_processes(folder) == []

    # Killed without a word, it takes vLLM with it; vLLM killed, the server says so and ends.
    serving, folder = begun()
    worker = next(one for one in find_processes(folder) if "engine.worker.serve" in one.cmdline())
    worker.kill()
    serving.wait(120)
    wait_until(lambda: find_processes(folder) == [])
    # By nobody but the server itself: also what vLLM has left behind.
    alone = servers.Server(tmp_path / "alone")
    server_process.begin(alone, servers.serve_settings(trained, servers.choose(trained, "", [ONE], "vllm"), ""), "key")
    servers.wait(alone)
    _inner(alone.path).kill()
    wait_until(lambda: not alone.alive)
    assert [one.code for one in alone.problems] == ["vllm-died"]
    wait_until(lambda: find_processes(alone.path) == [])

    monkeypatch.setenv("STAND_IN", "full")
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "vLLM, which served demo_model, has exited: ValueError: No available memory" in done.stderr


@pytest.mark.slow
def test_a_machine_that_lacks_the_program_of_another_says_so(trained: Workplace, program: None, tmp_path: Path) -> None:
    settings = servers.serve_settings(trained, servers.choose(trained, "", [ONE], "vllm"), "")
    server = servers.Server(tmp_path / "elsewhere")
    missing = {"vllm": settings["vllm"] | {"command": ["/opt/elsewhere/bin/vllm"]}}
    server_process.begin(server, settings | missing, "key")
    wait_until(lambda: not server.alive)
    assert "no program /opt/elsewhere/bin/vllm" in server.problems[0].text()


def _inner(folder: Path) -> psutil.Process:
    """vLLM's own process, the parent of its engine."""
    return next(one for one in find_processes(folder) if "serve" in one.cmdline())


def test_vllm_has_its_card_alone(workplace: Workplace, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine of the tests has no card: what nvidia-smi would say of two is put in their place.
    cards = tuple(hardware.Gpu(n, f"GPU-{n}", "H100", 80 << 30, free << 30, 9.0) for n, free in ((0, 70), (1, 60)))
    monkeypatch.setattr(hardware, "gpus", lambda: cards)
    monkeypatch.setenv("ATHANOR_LEASES", str(workplace.saves.parent / "leases"))
    choice = servers.choose(workplace, str(tiny))

    def placed(other: str, engine: str) -> int:
        leased = leases.take(["GPU-0"], leases.Holder("big", other, by="ada"))
        try:
            return servers.serve_settings(workplace, replace(choice, engine=engine), "")["card"]
        finally:
            for descriptor in leased:
                os.close(descriptor)

    assert placed("chat", "transformers") == 0  # two of them share the card with the most room
    assert placed("chat", "vllm") == placed("vllm", "transformers") == placed("vllm", "vllm") == 1
    assert placed("training", "transformers") == placed("training", "vllm") == 1
    cards = cards[:1]
    for pair in (("chat", "vllm"), ("vllm", "transformers"), ("training", "transformers")):
        with pytest.raises(Refusal, match=r"a run that waits: GPU 0: big \(ada\)\. Wait until"):
            placed(*pair)
    assert servers.serve_settings(workplace, choice, "")["card"] == 0  # all of them have ended


def test_what_vllm_would_not_take_is_refused_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [one.code for one in vllm.problems({}, {})] == ["vllm-missing"]
    monkeypatch.setattr(vllm, "program", lambda: "vllm")
    assert vllm.problems({}, {}) == []
    quantized = {"quantization": {"kind": "4bit"}, "rope_scaling": {"kind": "none"}}
    assert [one.code for one in vllm.problems(quantized, {})] == ["vllm-loading"]
    folders = {}
    for name, config in {"dora": {"r": 8, "use_dora": True}, "wide": {"r": 40}, "plain": {"r": 8}}.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        write_json(folders[name] / "adapter_config.json", config)
    assert [one.code for one in vllm.problems({}, folders)] == ["vllm-adapter", "vllm-dora"]
    assert vllm.rank(folders.values()) == 64
    # What cannot be read of other results of the base keeps nobody from loading it.
    for name, text in {
        "list": "[]",
        "text": '{"r": "x"}',
        "pattern": '{"r": 8, "rank_pattern": {"q": "x"}}',
    }.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "adapter_config.json").write_text(text, encoding="utf-8")
    (tmp_path / "folder" / "adapter_config.json").mkdir(parents=True)
    assert vllm.rank([*folders.values(), tmp_path / "folder"]) == 64
    assert vllm.rank([]) in MAX_LORA_RANKS


def test_the_last_words_of_a_log_are_those_that_name_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert vllm.error_line(log) == "—"
    log.write_text("(EngineCore pid=9) ERROR 11-26 02:14:56 [core.py:1] ValueError: too small\nbye\n", encoding="utf-8")
    assert vllm.error_line(log) == "ValueError: too small"
    log.write_text(
        "(EngineCore pid=9) torch.OutOfMemoryError: CUDA out of memory.\n"
        "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.\n",
        encoding="utf-8",
    )
    assert vllm.error_line(log) == "torch.OutOfMemoryError: CUDA out of memory."
    log.write_text("INFO 11-26 02:14:56 [core.py:1] starting\n\n", encoding="utf-8")
    assert vllm.error_line(log) == "starting"
