"""The models that answer: a base, its adapters, the inference engine, and whether they are loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Refusal
from engine.launch import engine_choice
from engine.serving import servers
from engine.serving.server import Server
from engine.serving.vllm import ENGINES, program
from webui import notices
from webui.chat_tab import server_html
from webui.chat_tab.api_panel import ApiPanel
from webui.chat_tab.chat_models import MAX_ADAPTERS_ASKED, ModelSelection
from webui.chat_tab.panel import Context, Panel
from webui.chat_tab.question_panel import QuestionPanel
from webui.chat_tab.settings_panel import SettingsPanel
from webui.events import LATEST, QUIET
from webui.panels import Updates, refusal_as_message
from webui.people import acting, hindrance
from webui.pickers import picker


class ModelPanel(Panel):
    """The panels `settings`, `api` and `question` depend on the selected models."""

    def __init__(self, context: Context, settings: SettingsPanel, api: ApiPanel, question: QuestionPanel):
        super().__init__(context)
        self.settings, self.api, self.question = settings, api, question

    def layout(self) -> None:
        words = self.words
        self.base = gr.Dropdown(
            [],
            value=None,
            label=words("chat-base"),
            elem_classes="field",
            elem_id="chat-base",
            allow_custom_value=True,
            interactive=True,
        )
        self.adapters = gr.Dropdown(
            [],
            value=[],
            label=words("chat-adapters"),
            info=words("chat-adapters-help"),
            multiselect=True,
            max_choices=MAX_ADAPTERS_ASKED,
            elem_classes="field",
            elem_id="chat-adapters",
            interactive=True,
        )
        self.engine = gr.Radio(
            list(ENGINES),
            value=ENGINES[0],
            label=words("chat-engine"),
            info=words("chat-engine-help"),
            visible=program() is not None,
            elem_classes="field",
            elem_id="chat-engine",
            interactive=True,
        )
        with gr.Row(elem_classes="held-row"):
            self.status = gr.HTML(elem_id="held")
            self.load = gr.Button(words("chat-load"), size="sm", elem_id="chat-load", scale=0, elem_classes="acts")
            self.unload = gr.Button(
                words("chat-unload"),
                size="sm",
                visible=False,
                elem_id="chat-unload",
                scale=0,
                elem_classes="acts owned",
            )

    def wire(self, timer: gr.Timer) -> None:
        """`timer` ticks while the tab is open."""
        acted = [self.message, *self.memory_outputs]
        gr.on([self.base.input, self.engine.input], self.show, self.inputs, self.outputs, **LATEST).then(
            self.show_memory, self.inputs, self.memory_outputs, **LATEST
        )
        self.adapters.input(self.choose_adapters, self.inputs, self.outputs, **LATEST).then(
            self.show_memory, self.inputs, self.memory_outputs, **LATEST
        )
        timer.tick(self.show_memory, self.inputs, self.memory_outputs, **QUIET)
        self.load.click(self.load_model, self.inputs, acted, **QUIET)
        self.unload.click(self.unload_model, self.inputs, acted, **QUIET)

    @property
    def inputs(self) -> list[Block]:
        """The controls in the order of the fields of ModelSelection."""
        return [self.base, self.adapters, self.engine]

    @property
    def outputs(self) -> list[Block]:
        """The components that depend on the selection or on the list of models."""
        return [self.base, self.adapters, *self.settings.outputs, *self.api.outputs, self.question.images]

    @property
    def memory_outputs(self) -> list[Block]:
        return [self.status, self.load, self.unload]

    def selection(self, values: Mapping[Block, Any]) -> ModelSelection:
        return ModelSelection(*(values[component] for component in self.inputs))

    # ---- selection

    def show(self, *selected: Any) -> Updates:
        """Update the lists of bases and runs, and the panels that depend on the selection."""
        selection = ModelSelection(*selected)
        run_ids = [result.id for result in self.models.selected_adapters(selection)]
        runs = self.models.adapter_choices(selection)
        return {
            self.base: gr.update(choices=self.models.bases(), value=selection.base),
            self.adapters: picker(runs, run_ids, self.words("chat-adapters-help"), self.words),
            **self.settings.for_models(selection),
            **self.api.for_models(selection._replace(run_ids=run_ids)),
            **self.question.for_models(self.models.reads_images(selection)),
        }

    def choose_adapters(self, *selected: Any) -> Updates:
        """Switch to the base of the run that was selected last."""
        return self.show(*self.models.with_base_of_last(ModelSelection(*selected)))

    # ---- memory

    def show_memory(self, *selected: Any) -> Updates:
        """Show whether the selected models are loaded, or why they cannot be."""
        selection = ModelSelection(*selected)
        try:
            return self.memory(servers.find(self.workplace.saves, self.models.choice(selection)))
        except Refusal as refusal:
            chosen = selection.base or selection.run_ids
            status = notices.listed(refusal.problems, self.words) if chosen else ""
            return {self.status: status, **self.memory_buttons(self.models.server(selection))}

    def memory(self, server: Server | None) -> Updates:
        """Show the state of a server, and what other servers are running."""
        others = [other for other in servers.servers(self.workplace.saves) if not server or other.path != server.path]
        since = max(time.time() - server.since, 0) if server else 0
        elsewhere = engine_choice.chats_stay_here(self.workplace.saves)
        status = server_html.status(server, others, self.models.titles(), since, self.words, elsewhere)
        if server and server.alive:
            mine = hindrance("unload", server.settings.get("by", ""))
            status += notices.denied(mine, "#chat-unload", self.words)
        return {self.status: status, **self.memory_buttons(server)}

    def memory_buttons(self, server: Server | None) -> Updates:
        """Show Load or Restart if the server is not running, else Unload, or Cancel while it waits to be started."""
        state = server.state if server else "ended"
        begin = self.words("chat-restart" if state == "failed" else "chat-load")
        end = self.words("chat-cancel" if state == "waiting" else "chat-unload")
        alive = state not in ("ended", "failed")
        return {
            self.load: gr.update(visible=not alive, value=begin),
            self.unload: gr.update(visible=alive, value=end),
        }

    @refusal_as_message
    def load_model(self, request: gr.Request, *selected: Any) -> Updates:
        choice = self.models.choice(ModelSelection(*selected))
        with acting(self.workplace.saves, "load", choice.name):
            return self.memory(servers.start(self.workplace, choice, by=self.context.user(request)))

    @refusal_as_message
    def unload_model(self, *selected: Any) -> Updates:
        done = "chat-unloaded"
        if server := self.models.server(ModelSelection(*selected)):
            done = "chat-cancelled" if server.state == "waiting" else done
            with acting(self.workplace.saves, "unload", server.name, server.settings.get("by", "")):
                servers.end(server)
        return {self.message: notices.toast(self.words(done)), **self.show_memory(*selected)}
