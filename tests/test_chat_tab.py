"""The handlers of the Chat tab, called without a browser: what they answer into which component."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from engine.core.problems import Refusal
from engine.core.rundir import write_json
from engine.data import limited_process
from engine.data.datasets import count_rows, find
from engine.data.images import decode, image_in_file, image_in_url
from engine.launch.workspace import Workplace
from engine.runs import runs
from engine.serving import chat_client, conversation_tree, server_process, servers
from engine.serving.attachments import attached_images
from engine.serving.conversation_tree import Conversation, Reply, Turn
from engine.serving.server import Server
from engine.spec.run_spec import RunSpec
from tests.conftest import wait_until
from tests.past_runs import past_run
from tests.slurm_commands import stand_in_commands
from tests.stand_in_server import StandInServer
from webui.chat_tab.answers_panel import AnswersPanel
from webui.chat_tab.api_panel import ApiPanel
from webui.chat_tab.browser_store import ConversationStore, EarlierStore
from webui.chat_tab.chat_models import ChatModels, ModelSelection
from webui.chat_tab.chat_settings import ChatSettings
from webui.chat_tab.conversation_panel import ConversationPanel
from webui.chat_tab.history_panel import HistoryPanel
from webui.chat_tab.model_panel import ModelPanel
from webui.chat_tab.panel import Context
from webui.chat_tab.question_panel import QuestionPanel
from webui.chat_tab.questions import models_to_ask, repeated_question, typed_question
from webui.chat_tab.settings_panel import SettingsPanel
from webui.chat_tab.tab_view import TabView
from webui.panels import Updates
from webui.words import Words

ENGLISH = Words("en")
ONE, TWO, FAR, JUDGE = "plain/lora/one", "plain/lora/two", "knowing/lora/far", "plain/lora/judge"
CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}
ADA, BOB = (SimpleNamespace(username=name, session_hash=f"session of {name}") for name in ("ada", "bob"))


@pytest.fixture
def place(tmp_path: Path, data: Path) -> Workplace:
    """Two bases, the second with a template that knows tools and thinking; two runs
    of the first, the newer is "two", one of the second, and a reward model."""
    models, saves = tmp_path / "models", tmp_path / "saves"
    for name, template in (("plain", "{{ messages }}"), ("knowing", "{{ tools }}{{ enable_thinking }}")):
        (models / name).mkdir(parents=True)
        (models / name / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        (models / name / "chat_template.jinja").write_text(template)
    for number, (id, stage) in enumerate({JUDGE: "rm", FAR: "sft", ONE: "sft", TWO: "dpo"}.items()):
        base, _, name = id.split("/")
        spec = RunSpec.read({"model": {"model_name_or_path": str(models / base)}, "stage": {"kind": stage}})
        past_run(saves, spec.change("name", name), at=1e9 + number)
    return Workplace(models=(models,), data=data, saves=saves)


class Tab:
    """The panels, put together as the page does it, and what the controls hold when one arrives."""

    def __init__(self, workplace: Workplace):
        self.bases = [(folder.name, str(folder)) for folder in sorted(workplace.models[0].iterdir())[::-1]]
        self.plain, self.knowing = (folder for _, folder in self.bases)
        user = lambda request: request.username  # noqa: E731
        with gr.Blocks():
            self.current, self.earlier = ConversationStore("talk", user), EarlierStore("talks", user)
            self.models = ChatModels(ENGLISH, workplace, lambda: self.bases)
            self.context = context = Context(
                ENGLISH, workplace, gr.HTML(), user, self.models, self.current, self.earlier
            )
            self.question, self.settings = QuestionPanel(context), SettingsPanel(context)
            self.api = ApiPanel(context)
            self.model = ModelPanel(context, self.settings, self.api, self.question)
            self.conversation = ConversationPanel(context, self.question)
            self.history = HistoryPanel(context, self.model, self.conversation)
            self.answers = AnswersPanel(context, self.question, self.conversation, self.model, self.settings)
            for panel in (
                self.conversation,
                self.answers,
                self.question,
                self.model,
                self.settings,
                self.history,
                self.api,
            ):
                panel.layout()
            self.view = TabView(context, gr.Timer(active=False), self.model, self.conversation, self.history)

    def values(self, selection: ModelSelection, question: str = "", **changes: Any) -> dict[Any, Any]:
        """What the controls hold that `ask` is given; `changes` are by the names of the settings' components."""
        held = {component: component.value for component in self.settings.inputs}
        held |= dict(zip(self.model.inputs, selection, strict=True))
        held |= {
            self.question.prompt: question,
            self.question.images: None,
            self.question.is_tool_result: True,
            self.current.component: {},
        }
        for name, value in changes.items():
            held[self.settings.numbers.get(name) or getattr(self.settings, name)] = value
        return held

    def read(self, updates: Updates, request: Any = ADA) -> Conversation:
        """The conversation that an answer has the browser keep."""
        return self.current.read(updates[self.current.component], request)


@pytest.fixture
def tab(place: Workplace) -> Tab:
    return Tab(place)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInServer]:
    stand_in = StandInServer()
    monkeypatch.setattr(server_process, "begin", stand_in.begin)
    yield stand_in
    stand_in.die()


def stored(conversation: Conversation, user: str = "ada") -> dict[str, Any]:
    return {user: conversation_tree.as_plain(conversation)}


def click(**data: Any) -> gr.EventData:
    return gr.EventData(None, data)


def answered(*questions: str) -> Conversation:
    conversation = Conversation()
    for question in questions:
        replies = {"plain": Reply("No."), ONE: Reply(f"{question} Yes.")}
        conversation = conversation.add(Turn(question, said=replies))
    return conversation


# ------------------------------------------------------------------------------------------ which models


def test_one_arrives_at_the_newest_run_that_can_be_talked_to(tab: Tab) -> None:
    updates = tab.view.arrive(ADA, {}, {}, None, [], "transformers")
    assert updates.keys() == set(tab.view.outputs)
    assert updates[tab.view.timer].active is True
    assert updates[tab.model.base] == gr.update(choices=tab.bases, value=tab.plain)
    assert updates[tab.model.adapters]["value"] == [TWO]
    assert [id for _, id in updates[tab.model.adapters]["choices"]] == [TWO, ONE, FAR]
    assert updates[tab.model.adapters]["choices"][2][0].endswith("· knowing")
    assert "Not loaded" in updates[tab.model.status]
    assert updates[tab.settings.reward_model]["choices"] == [("None", ""), ("judge", JUDGE)]
    assert updates[tab.settings.thinking]["visible"] is False
    assert f"serve {TWO}" in updates[tab.api.command]
    assert updates[tab.history.fold]["visible"] is False


def test_one_comes_back_to_who_answered_last_in_one_s_own_conversation(tab: Tab) -> None:
    kept = stored(answered("Really?"))
    mine = tab.view.arrive(ADA, kept, {}, None, [], "transformers")
    assert mine[tab.model.adapters]["value"] == [ONE]
    assert "Really? Yes." in mine[tab.conversation.turns]
    theirs = tab.view.arrive(BOB, kept, {}, None, [], "transformers")
    assert theirs[tab.model.adapters]["value"] == [TWO]
    assert "Really?" not in theirs[tab.conversation.turns]
    for nonsense in (None, "text", [1], {"ada": 3}):
        updates = tab.view.arrive(ADA, nonsense, nonsense, tab.plain, [TWO], "transformers")
        assert "Ask" in updates[tab.conversation.turns]


def test_a_run_of_another_base_brings_its_base_and_what_that_knows(tab: Tab) -> None:
    updates = tab.model.choose_adapters(tab.plain, [ONE, FAR], "transformers")
    assert updates.keys() == set(tab.model.outputs)
    assert updates[tab.model.base]["value"] == tab.knowing
    assert updates[tab.model.adapters]["value"] == [FAR]
    assert updates[tab.settings.thinking]["visible"] is True
    assert updates[tab.settings.tools_fold]["visible"] is True
    Path(tab.knowing, "chat_template.jinja").write_text("{{ tools }}")
    updates = tab.model.show(tab.knowing, [FAR], "transformers")
    assert updates[tab.settings.thinking]["visible"] is False
    assert updates[tab.settings.tools_fold]["visible"] is True
    assert tab.model.show(tab.plain, [ONE, FAR], "transformers")[tab.model.adapters]["value"] == [ONE]


def test_the_checkpoints_of_a_chosen_run_can_be_chosen(place: Workplace, tab: Tab) -> None:
    for step, complete in ((9, True), (10, True), (20, False)):
        folder = place.saves / TWO / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        if complete:
            write_json(folder / "complete.json", {})
    none = tab.model.show(*ModelSelection(tab.plain, []))[tab.model.adapters]
    assert [value for _, value in none["choices"]] == [TWO, ONE, FAR]
    nine = f"{TWO}/checkpoint-9"
    selection = ModelSelection(
        tab.plain, [nine, ONE, f"{TWO}/checkpoint-20", f"{FAR}/checkpoint-1", "../x/checkpoint-1"]
    )
    shown = tab.model.show(*selection)[tab.model.adapters]
    assert [value for _, value in shown["choices"]] == [TWO, f"{TWO}/checkpoint-10", nine, ONE, FAR]
    assert shown["choices"][2][0] == "two · checkpoint 9"
    assert shown["value"] == [nine, ONE]
    selection = ModelSelection(tab.plain, [nine])
    choice = tab.models.choice(selection)
    assert (dict(choice.adapters), choice.base) == ({nine: place.saves / nine}, Path(tab.plain))
    assert tab.models.titles(selection)[nine] == "two · checkpoint 9"
    assert tab.models.of_models([nine], ModelSelection(None)) == selection
    assert tab.models.with_base_of_last(ModelSelection(tab.knowing, [nine])).base == tab.plain
    (place.saves / TWO / "initial_adapter").mkdir()  # of PiSSA: its checkpoints fit another base
    with pytest.raises(Refusal):
        tab.models.choice(selection)


def test_models_are_loaded_found_restarted_and_unloaded(place: Workplace, tab: Tab, server: StandInServer) -> None:
    selected = (tab.plain, [ONE], "transformers")
    loaded = tab.model.load_model(ADA, *selected)
    assert loaded.keys() == set(tab.model.memory_outputs)
    assert "Loaded" in loaded[tab.model.status]
    assert (loaded[tab.model.load]["visible"], loaded[tab.model.unload]["visible"]) == (False, True)
    beside = tab.model.show_memory(tab.knowing, [], "transformers")
    assert "Not loaded" in beside[tab.model.status]
    assert "<b>plain</b> ada" in beside[tab.model.status]
    server.die()
    assert tab.model.show_memory(*selected)[tab.model.load] == gr.update(visible=True, value="Restart")
    tab.model.load_model(ADA, *selected)
    unloaded = tab.model.unload_model(*selected)
    assert "toast good" in unloaded[tab.context.message]
    assert "Not loaded" in unloaded[tab.model.status]
    assert "Slurm" not in unloaded[tab.model.status]
    (place.saves / "engine.yaml").write_text("engine: slurm\nchats: local\n")
    assert "only runs go to Slurm" in tab.model.show_memory(*selected)[tab.model.status]


def test_a_question_whose_model_waits_for_slurm_says_why_and_can_be_taken_back(
    place: Workplace, tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = stand_in_commands(tmp_path, monkeypatch)
    (place.saves / "engine.yaml").write_text("engine: slurm\n")
    selection, selected = ModelSelection(tab.plain, [ONE]), (tab.plain, [ONE], "transformers")
    commands(sbatch="echo 'sbatch: error: invalid partition' >&2; exit 1")
    begun = tab.answers.ask(tab.values(selection, "Who?"), ADA)
    assert "does not accept the job that would serve plain: invalid partition" in [*begun][-1][tab.context.message]
    assert "invalid partition" in tab.model.show_memory(*selected)[tab.model.status]
    commands(sbatch="echo 7", squeue="echo '7|PENDING|Resources|x'")
    asking = tab.answers.ask(tab.values(selection, "Who?"), ADA)
    begun, shown = next(asking), next(asking)
    assert begun[tab.model.unload] == gr.update(visible=True, value="Cancel")
    assert "Resources: not enough machines" in begun[tab.model.status]
    assert "Resources: not enough machines" in shown[tab.answers.live]
    tab.answers.stop(BOB)  # is none of his business
    tab.answers.stop(ADA)
    [ended] = asking
    assert (ended[tab.question.prompt], ended[tab.answers.live]) == ("Who?", "")
    assert tab.context.message not in ended
    monkeypatch.setattr(servers, "QUEUE_S", 0.0)
    *_, ended = tab.answers.ask(tab.values(selection, "Who?"), ADA)
    assert "ask again once it is loaded" in ended[tab.context.message]
    assert ended[tab.question.prompt] == "Who?"
    [server] = servers.servers(place.saves)
    write_json(server.folder.keeper, {"job": "7", "machines": "n1", "started": 1.0})
    write_json(server.path / "address.json", {"host": "127.0.0.1", "port": 1})
    commands(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    status = tab.model.show_memory(*selected)[tab.model.status]
    assert "Loaded" in status  # only Slurm can say that it has ended
    assert "Slurm does not answer (Unable to contact" in status
    commands(squeue="echo '7|RUNNING|None|x'")
    monkeypatch.setattr(chat_client, "ENDING_ON_SLURM_SECONDS", 0.0)
    with pytest.raises(Refusal, match=r"does not reach it at 127\.0\.0\.1, port 1: Connection refused"):
        chat_client.served_models(server)
    commands(squeue="echo '7|PENDING|Priority|x'", scancel=f"echo squeue > {tmp_path}/cancelled")
    assert "Priority" in tab.model.show_memory(*selected)[tab.model.status]
    commands(squeue=f"test -e {tmp_path}/cancelled || echo '7|PENDING|Priority|x'")
    assert "cancelled" in tab.model.unload_model(*selected)[tab.context.message]
    assert "scancel 7" in (tmp_path / "calls").read_text()
    assert servers.servers(place.saves) == []


def test_what_cannot_be_loaded_is_said(tab: Tab, server: StandInServer) -> None:
    updates = tab.model.load_model(ADA, "/etc", [], "transformers")
    assert updates.keys() == {tab.context.message}
    assert "toast bad" in updates[tab.context.message]
    assert "/etc" in tab.model.show_memory("/etc", [], "transformers")[tab.model.status]
    assert tab.model.show_memory(None, None, "transformers")[tab.model.status] == ""


# ------------------------------------------------------------------------------------------ a question


def test_a_question_is_answered_by_the_base_and_the_run(tab: Tab, server: StandInServer) -> None:
    values = tab.values(ModelSelection(tab.plain, [ONE]), " Who? ", system="Be brief.", seed="5", greedy=False)
    begun, *live, ended = tab.answers.ask(values, ADA)
    assert begun[tab.question.prompt] == ""
    assert "Who?" in begun[tab.answers.live]
    assert begun[tab.question.stop]["visible"] is True
    assert tab.read(begun).turns == (Turn("Who?", "Be brief."),)
    assert all(updates.keys() == {tab.answers.live} for updates in live)
    assert "plain heard 2." in live[-1][tab.answers.live]
    assert "plain/lora/one heard 2." in live[-1][tab.answers.live]
    assert "<b>plain (base)</b>" in live[-1][tab.answers.live]
    assert ended[tab.answers.live] == ""
    assert tab.question.send not in ended  # the page shows it after the end, since before it would drop a click
    assert "Loaded" in ended[tab.model.status]
    assert tab.context.message not in ended
    assert tab.question.prompt not in ended  # something may have been typed meanwhile
    [turn] = tab.read(ended).turns
    assert {model: reply.text for model, reply in turn.said.items()} == {
        "plain": "plain heard 2.",
        ONE: f"{ONE} heard 2.",
    }
    assert turn.said[ONE].tokens_per_s == 28
    request = server.posted("/v1/chat/completions")[0]
    assert (request["temperature"], request["seed"], request["max_tokens"]) == (0.7, 5, 512)
    assert (request["request_id"], request["thinking"]) == ("session of ada", True)
    for updates in (begun, ended):
        assert updates.keys() <= set(tab.answers.outputs)


def test_a_question_is_asked_with_its_images(tab: Tab, server: StandInServer, tmp_path: Path) -> None:
    Image.new("RGB", (1536, 512), (250, 0, 0)).save(tmp_path / "a.png")
    values = tab.values(ModelSelection(tab.plain, []), "What is it?")
    values[tab.question.images] = [str(tmp_path / "a.png")]
    begun, *live, ended = tab.answers.ask(values, ADA)
    assert begun[tab.question.images] is None
    assert all("data:image" not in updates[tab.answers.live] for updates in live)
    assert "1 image" in live[-1][tab.answers.live]
    assert '<img class="thumbnail" src="data:image/jpeg' in ended[tab.conversation.turns]
    ((image, text),) = [message["content"] for message in server.posted("/v1/chat/completions")[0]["messages"]]
    assert text == {"type": "text", "text": "What is it?"}
    seen = image_in_url(image["image_url"]["url"])
    assert seen.size == (768, 256)
    assert decode(seen).getpixel((9, 9))[0] > 240

    values[tab.current.component] = ended[tab.current.component]
    *_, again = tab.answers.ask_again(values, ADA)
    assert tab.read(again).turns[1].images == tab.read(ended).turns[0].images
    kept, selected = ended[tab.current.component], (tab.plain, [], "transformers")
    edited = tab.conversation.click(click(do="edit", turn="0"), ADA, kept, *selected)
    (file,) = edited[tab.question.images]["value"]
    assert image_in_file(Path(file)).size == (768, 256)
    rated = tab.conversation.click(click(do="up", turn="0", voice="plain"), ADA, kept, *selected)
    assert conversation_tree.RATINGS_DATASET in rated[tab.context.message]
    (row,) = map(json.loads, conversation_tree.jsonl(tab.read(ended)).splitlines())
    assert row["messages"][0]["content"] == [image, text]


def test_an_image_that_cannot_be_read_is_refused_and_the_question_stays(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    values = tab.values(ModelSelection(tab.plain, []), "What is it?")
    for files, reason in (([str(tmp_path / "a.png")], "format"), ([str(tmp_path / "a.png")] * 9, "9 images")):
        values[tab.question.images] = files
        [updates] = tab.answers.ask(values, ADA)
        assert reason in updates[tab.context.message]
        assert updates.keys() == {tab.context.message}


ATTACH = """
import re, sys
from engine.serving.attachments import attached_images
def peak():  # of this program alone: getrusage also counts the process that has started it
    return int(re.search("VmHWM: *\t* *([0-9]+) kB", open("/proc/self/status").read())[1])
before = peak()
(url,) = attached_images(sys.argv[1:])
print(len(url), peak() - before)
"""


def test_a_large_image_takes_no_memory_of_the_studio(tmp_path: Path) -> None:
    """64 million pixels of one colour: 200 KB on disk, 192 MB decoded."""
    Image.new("RGB", (8000, 8000), (250, 0, 0)).save(tmp_path / "a.png")
    command = [sys.executable, "-c", ATTACH, str(tmp_path / "a.png")]
    length, grown = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert length > 1000
    assert grown < 20_000  # KB


def test_an_image_beyond_the_limits_of_its_process_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8000, 8000)).save(tmp_path / "a.png")
    monkeypatch.setattr(limited_process, "MAX_MEMORY", 150 << 20)
    with pytest.raises(Refusal) as refusal:
        attached_images([str(tmp_path / "a.png")])
    assert [(issue.code, issue.values["image"]) for issue in refusal.value.problems] == [
        ("chat-image-takes-too-much", "a.png")
    ]


def test_images_are_offered_to_models_that_read_them(tab: Tab) -> None:
    assert tab.model.show(tab.plain, [], "transformers")[tab.question.images]["visible"] is False
    Path(tab.plain, "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    assert tab.model.show(tab.plain, [], "transformers")[tab.question.images]["visible"] is True
    assert tab.model.show(tab.plain, [], "vllm")[tab.question.images]["visible"] is False


def test_only_images_of_its_own_come_back_from_a_browser() -> None:
    own = Conversation((Turn("?", images=("data:image/jpeg;base64,AAAA",)),), 0)
    assert conversation_tree.read(conversation_tree.as_plain(own)) == own
    for url in ('data:image/jpeg;base64,AA" onerror="', "https://example.org/a.png"):
        foreign = conversation_tree.as_plain(Conversation((Turn("?", images=(url,)),), 0))
        assert conversation_tree.read(foreign) == Conversation()


def test_the_next_question_is_asked_with_what_came_before_it_if_it_is_remembered(
    tab: Tab, server: StandInServer
) -> None:
    selection = ModelSelection(tab.plain, [])
    for remember, count in ((True, 3), (False, 1)):
        values = tab.values(selection, "And?", remember=remember)
        values[tab.current.component] = stored(answered("Really?"))
        *_, ended = tab.answers.ask(values, ADA)
        assert tab.read(ended).turns[-1].said["plain"].text == f"plain heard {count}."


def test_the_last_question_is_asked_again_in_a_branch_of_its_own(tab: Tab, server: StandInServer) -> None:
    values = tab.values(ModelSelection(tab.plain, [ONE]), "typed meanwhile")
    values[tab.current.component] = stored(answered("First?", "Really?"))
    *_, ended = tab.answers.ask_again(values, ADA)
    conversation = tab.read(ended)
    assert [turn.question for turn in conversation.turns] == ["First?", "Really?", "Really?"]
    assert conversation.children(0) == (1, 2)
    assert "2 / 2" in ended[tab.conversation.turns]


@pytest.mark.parametrize(
    ("replies", "offered"),
    [
        ({"plain": Reply("All of it.", finish="stop")}, False),
        ({"plain": Reply("As long as it may be", finish="length")}, False),
        ({"plain": Reply("All of it.", finish="stop"), ONE: Reply("Some of", finish="error")}, True),
        ({"plain": Reply("Stopped", finish="cancelled")}, True),
        ({}, True),  # the page was closed
    ],
)
def test_an_interrupted_answer_can_be_tried_again(tab: Tab, replies: dict[str, Reply], offered: bool) -> None:
    selection, button = ModelSelection(tab.plain, [ONE]), 'data-do="again"'
    conversation = answered("First?").add(Turn("Really?", said=replies))
    assert (button in tab.conversation.show(conversation, selection)[tab.conversation.turns]) is offered
    later = conversation.add(Turn("Then?", said={"plain": Reply("Yes.", finish="stop")}))
    for shown in (
        tab.conversation.show(later, selection),  # what came after it would become another branch
        tab.conversation.show(conversation, selection, answering=True),
    ):
        assert button not in shown[tab.conversation.turns]


def test_a_model_that_fails_before_its_first_word_can_be_asked_again(tab: Tab, server: StandInServer) -> None:
    server.failing = {ONE}
    selection, button = ModelSelection(tab.plain, [ONE]), 'data-do="again"'
    *_, ended = tab.answers.ask(tab.values(selection, "Who?"), ADA)
    assert "it is broken" in ended[tab.context.message]
    assert list(tab.read(ended).turns[0].said) == ["plain"]
    assert button in ended[tab.conversation.turns]
    server.failing = set()
    values = tab.values(selection)
    values[tab.current.component] = stored(tab.read(ended))
    *_, ended = tab.answers.ask_again(values, ADA)
    assert list(tab.read(ended).turns[-1].said) == ["plain", ONE]
    assert button not in ended[tab.conversation.turns]


def test_a_thought_that_the_prompt_has_opened_is_shown_as_one_at_once(tab: Tab, server: StandInServer) -> None:
    server.opens_reasoning = True
    *live, ended = tab.answers.ask(tab.values(ModelSelection(tab.plain, []), "Who?"), ADA)
    written = [updates[tab.answers.live] for updates in live if "heard" in updates[tab.answers.live]]
    assert written
    assert all("<div>plain heard" in html for html in written)
    assert tab.read(ended).turns[0].said["plain"].opened
    assert "<div>plain heard 1.</div></details><" in ended[tab.conversation.turns]


def test_an_answer_in_channels_goes_on_as_its_thought_and_what_stands_behind_it() -> None:
    text = "<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>Four."
    assert Reply(text).message == {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"}
    assert Reply("<think>2</think>Four.").message == {"role": "assistant", "content": "<think>2</think>Four."}


def test_nothing_is_asked_where_nothing_is_typed(tab: Tab) -> None:
    values = tab.values(ModelSelection(tab.plain, [ONE]), "  ")
    assert list(tab.answers.ask(values, ADA)) == [gr.skip()]
    assert list(tab.answers.ask_again(values, ADA)) == [gr.skip()]


def test_a_refused_question_is_back_in_its_box_and_nothing_is_kept(tab: Tab, place: Workplace) -> None:
    selection = ModelSelection(tab.plain, [ONE])
    for values, reason in (
        (tab.values(selection, "Who?", max_tokens="many"), "Max tokens must be"),
        (tab.values(selection, "Who?", top_k="2.5", greedy=False), "Top-k must be"),
        (tab.values(ModelSelection("/etc", []), "Who?"), "/etc"),
    ):
        [updates] = tab.answers.ask(values, ADA)
        assert reason in updates[tab.context.message]
        assert updates[tab.question.prompt] == "Who?"
        assert tab.read(updates) == Conversation()
    assert servers.servers(place.saves) == []


def test_a_server_that_dies_takes_no_question_with_it(tab: Tab, server: StandInServer) -> None:
    values = tab.values(ModelSelection(tab.plain, []), "Who?")
    answers = tab.answers.ask(values, ADA)
    next(answers)
    server.die()
    *_, ended = answers
    assert "toast bad" in ended[tab.context.message]
    assert ended[tab.question.prompt] == "Who?"
    assert ended[tab.model.load] == gr.update(visible=True, value="Restart")


def test_answers_are_scored_by_a_reward_model_and_stay_without_it(tab: Tab, server: StandInServer) -> None:
    selection = ModelSelection(tab.plain, [])
    *_, ended = tab.answers.ask(tab.values(selection, "Who?", reward_model=JUDGE), ADA)
    assert tab.read(ended).turns[0].said["plain"].score == 0.5
    assert "0.50" in ended[tab.conversation.turns]
    *_, ended = tab.answers.ask(tab.values(selection, "Who?", reward_model="plain/lora/gone"), ADA)
    assert "plain/lora/gone" in ended[tab.context.message]
    assert tab.read(ended).turns[0].said["plain"].score is None


def test_tools_are_sent_where_a_template_knows_them_and_their_results_to_who_called(
    tab: Tab, server: StandInServer
) -> None:
    definition = '{"name": "add", "parameters": {"type": "object"}}'
    knowing = ModelSelection(tab.knowing, [FAR])
    [updates] = tab.answers.ask(tab.values(knowing, "1 + 1?", tools="{"), ADA)
    assert updates.keys() == {tab.context.message}
    server.calls = [{"name": "add", "arguments": json.dumps(CALL["arguments"])}]
    *_, ended = tab.answers.ask(tab.values(knowing, "1 + 1?", tools=definition), ADA)
    assert server.posted("/v1/chat/completions")[-1]["tools"][0]["function"]["name"] == "add"
    assert ended[tab.question.is_tool_result]["visible"] is True
    called = tab.read(ended)
    assert called.turns[0].said[FAR].calls == (CALL,)
    server.calls = []
    values = tab.values(knowing, "2", tools=definition)
    values[tab.current.component] = stored(called)
    *_, ended = tab.answers.ask(values, ADA)
    assert tab.read(ended).turns[-1].role == "tool"
    assert ended[tab.question.is_tool_result]["visible"] is False
    list(tab.answers.ask(tab.values(ModelSelection(tab.plain, []), "1 + 1?", tools="{"), ADA))
    assert "tools" not in server.posted("/v1/chat/completions")[-1]


def test_stop_ends_the_answers_of_this_reader(tab: Tab, server: StandInServer) -> None:
    tab.model.load_model(ADA, tab.plain, [], "transformers")
    tab.answers.stop(BOB)
    assert server.posted("/v1/cancel") == [{"request_id": "session of bob"}]


def test_stop_does_not_wait_for_another_server_that_does_not_respond(
    place: Workplace, tab: Tab, server: StandInServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab.model.load_model(ADA, tab.plain, [], "transformers")
    silent = Server(place.saves / servers.SERVERS_FOLDER / "silent")
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        server.begin(silent, {"name": "silent", "adapters": {}, "started": 1.0}, "")  # looked at first
        write_json(silent.path / "address.json", {"host": "127.0.0.1", "port": listening.getsockname()[1]})
        monkeypatch.setattr(chat_client, "CONNECT_SECONDS", 600.0)
        stopped = pool.submit(tab.answers.stop, ADA)
        wait_until(lambda: server.posted("/v1/cancel") == [{"request_id": "session of ada"}])
        assert not stopped.done()
        listening.accept()[0].close()
        stopped.result(300)
        monkeypatch.setattr(chat_client, "CONNECT_SECONDS", 0.5)
        pool.submit(tab.answers.stop, ADA).result(300)  # and not until an answer would have to be there


def test_who_is_asked_and_what() -> None:
    called = Conversation().add(Turn("1 + 1?", said={"a": Reply("", calls=(CALL,)), "b": Reply("2")}))
    result = typed_question(called, " 2 ", True)
    assert (result.text, result.is_tool_result) == ("2", True)
    assert not typed_question(answered("Really?"), "2", True).is_tool_result
    assert models_to_ask(["a", "b"], Turn("2", role="tool"), called) == ["a"]
    assert models_to_ask(["a", "b"], Turn("2"), called) == ["a", "b"]
    with pytest.raises(Refusal):
        models_to_ask(["b"], Turn("2", role="tool"), called)
    assert repeated_question(called).before.tip == -1


def test_greedy_answers_leave_the_hidden_settings_out() -> None:
    numbers = {"temperature": "hot", "top_p": "", "top_k": "3", "seed": "７", "max_tokens": " 20 "}
    settings = ChatSettings(numbers, greedy=True, thinking=False, remember=True, system="", tools="", reward_model="")
    assert settings.generation() == {"temperature": 0, "max_tokens": 20, "thinking": False}
    drawn = ChatSettings(
        numbers | {"temperature": "0.5"}, False, thinking=True, remember=True, system="", tools="", reward_model=""
    )
    assert drawn.generation() == {"temperature": 0.5, "top_k": 3, "seed": 7, "max_tokens": 20, "thinking": True}


# ------------------------------------------------------------------------------------------ the conversation


def test_answers_are_rated_into_the_data_folder_and_marked(tab: Tab, data: Path) -> None:
    kept, selected = stored(answered("Really?")), (tab.plain, [ONE], "transformers")
    rated = tab.conversation.click(click(do="up", turn="0", voice=ONE), ADA, kept, *selected)
    assert conversation_tree.RATINGS_DATASET in rated[tab.context.message]
    assert tab.read(rated).turns[0].said[ONE].rating == "up"
    assert count_rows(find(data, conversation_tree.RATINGS_DATASET)) == 1
    better = tab.conversation.click(click(do="better", turn="0", voice=ONE), ADA, kept, *selected)
    assert conversation_tree.PREFERENCES_DATASET in better[tab.context.message]
    assert 'class="answer best"' in better[tab.conversation.turns]


def test_a_question_goes_back_into_its_box_and_other_branches_are_found(tab: Tab) -> None:
    kept, selected = stored(answered("First?", "Really?")), (tab.plain, [ONE], "transformers")
    edited = tab.conversation.click(click(do="edit", turn="1"), ADA, kept, *selected)
    assert edited[tab.question.prompt] == "Really?"
    assert tab.read(edited).tip == 0
    back = tab.conversation.click(click(do="go", turn="1"), ADA, edited[tab.current.component], *selected)
    assert tab.read(back).tip == 1
    assert tab.question.prompt not in back
    for wrong in ({"do": "edit", "turn": "9"}, {"do": "go"}, {"do": "up", "turn": "0", "voice": "nobody"}):
        updates = tab.conversation.click(click(**wrong), ADA, kept, *selected)
        assert updates.keys() == {tab.context.message}
    nothing = tab.conversation.click(click(do="dance", turn="0"), ADA, kept, *selected)
    assert tab.read(nothing) == answered("First?", "Really?")


def test_a_conversation_is_put_away_taken_up_again_and_dropped(tab: Tab) -> None:
    kept, selected = stored(answered("Really?")) | {"bob": 1}, (tab.plain, [TWO], "transformers")
    new = tab.history.start_new(ADA, kept, {}, *selected)
    assert tab.read(new) == Conversation()
    assert new[tab.current.component]["bob"] == 1
    assert "Really?" in new[tab.history.list]
    assert new[tab.history.fold]["visible"] is True
    earlier = new[tab.earlier.component]
    assert tab.earlier.read(earlier, BOB) == []
    other = stored(answered("Other?"))
    opened = tab.history.click(click(do="open", turn="0"), ADA, other, earlier, *selected)
    assert tab.read(opened) == answered("Really?")
    assert opened[tab.model.adapters]["value"] == [ONE]  # who answered in it goes on
    assert "Other?" in opened[tab.history.list]
    dropped = tab.history.click(click(do="drop", turn="0"), ADA, other, earlier, *selected)
    assert tab.read(dropped) == answered("Other?")
    assert dropped[tab.history.list] == ""
    for wrong in (click(do="open", turn="7"), click(do="open"), click(do="up", turn="0")):
        unchanged = tab.history.click(wrong, ADA, other, earlier, *selected)
        assert tab.read(unchanged) == answered("Other?")
        assert "Really?" in unchanged[tab.history.list]


def test_a_cleared_conversation_is_gone_for_its_owner_alone(tab: Tab) -> None:
    kept = stored(answered("Really?")) | stored(answered("Other?"), "bob")
    updates = tab.conversation.clear(ADA, kept, tab.plain, [ONE], "transformers")
    assert tab.read(updates) == Conversation()
    assert tab.read(updates, BOB) == answered("Other?")
    assert updates[tab.question.export] == ""
    assert "chat.jsonl" in tab.conversation.show(answered("Really?"), ModelSelection(tab.plain))[tab.question.export]


def test_a_run_is_talked_to_with_its_base(tab: Tab, place: Workplace) -> None:
    assert tab.models.of_run(runs.get(place.saves, FAR)) == (tab.knowing, [FAR])
    with pytest.raises(Refusal):
        tab.models.of_run(runs.get(place.saves, JUDGE))
