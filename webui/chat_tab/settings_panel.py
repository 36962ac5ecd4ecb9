"""Settings of the answers: system prompt, sampling, thinking, tools, and the reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.serving.conversation_tree import TOOL_EXAMPLE
from webui import boxes
from webui.chat_tab.chat_models import THINKING_VARIABLE, TOOLS_VARIABLE, ModelSelection
from webui.chat_tab.chat_settings import SETTING_LABELS, ChatSettings
from webui.chat_tab.panel import Panel
from webui.events import QUIET
from webui.panels import Updates


class SettingsPanel(Panel):
    def layout(self) -> None:
        words = self.words
        self.system = gr.Textbox(
            label=words("chat-system"), lines=2, max_lines=8, elem_classes="field", elem_id="chat-system"
        )
        self.greedy = gr.Checkbox(
            True, label=words("chat-greedy"), info=words("chat-greedy-help"), elem_id="chat-greedy"
        )
        with gr.Column(visible=False, elem_classes="grid grid-2") as self.sampling:
            self.numbers = {
                "temperature": self._number("temperature", "0.7"),
                "top_p": self._number("top_p", "0.9"),
                "top_k": self._number("top_k", "0"),
                "seed": self._number("seed", placeholder=words("chat-seed-none")),
            }
        with gr.Column(elem_classes="grid grid-2"):
            self.numbers["max_tokens"] = self._number("max_tokens", "512")
            self.numbers["repetition_penalty"] = self._number("repetition_penalty", "1")
        self.remember = gr.Checkbox(
            True, label=words("chat-remember"), info=words("chat-remember-help"), elem_id="chat-remember"
        )
        self.thinking = gr.Checkbox(True, label=words("chat-thinking"), visible=False, elem_id="chat-thinking")
        self.reward_model = gr.Dropdown(
            [],
            value=None,
            label=words("chat-judge"),
            info=words("chat-judge-help"),
            visible=False,
            elem_classes="field",
            elem_id="chat-judge",
            interactive=True,
        )
        with gr.Accordion(
            words("chat-tools"), open=False, visible=False, elem_classes="fold", elem_id="chat-tools-fold"
        ) as self.tools_fold:
            self.tools = gr.Textbox(
                label=words("chat-tools"),
                show_label=False,
                info=words("chat-tools-help"),
                placeholder=TOOL_EXAMPLE,
                lines=4,
                max_lines=16,
                elem_classes="field mono",
                elem_id="chat-tools",
            )

    def _number(self, name: str, value: str = "", placeholder: str | None = None) -> gr.Textbox:
        code = SETTING_LABELS[name]
        return boxes.number(value, label=self.words(code), elem_id=code, placeholder=placeholder)

    def wire(self) -> None:
        self.greedy.change(lambda on: gr.update(visible=not on), self.greedy, self.sampling, **QUIET)

    @property
    def inputs(self) -> list[Block]:
        """The controls whose values `read` takes."""
        return [
            self.system,
            self.greedy,
            *self.numbers.values(),
            self.remember,
            self.thinking,
            self.reward_model,
            self.tools,
        ]

    @property
    def outputs(self) -> list[Block]:
        """The components that depend on the selected models."""
        return [self.thinking, self.tools_fold, self.reward_model]

    def read(self, values: Mapping[Block, Any]) -> ChatSettings:
        return ChatSettings(
            numbers={name: values[number] for name, number in self.numbers.items()},
            greedy=bool(values[self.greedy]),
            thinking=bool(values[self.thinking]),
            remember=bool(values[self.remember]),
            system=values[self.system] or "",
            tools=values[self.tools] or "",
            reward_model=values[self.reward_model] or "",
        )

    def for_models(self, selection: ModelSelection) -> Updates:
        """Offer the reward models, and what the templates of the selected models support."""
        reward_models = self.models.reward_model_choices()
        choices = [(self.words("chat-judge-none"), ""), *reward_models]
        return {
            self.thinking: gr.update(visible=self.models.template_has(THINKING_VARIABLE, selection)),
            self.tools_fold: gr.update(visible=self.models.template_has(TOOLS_VARIABLE, selection)),
            self.reward_model: gr.update(choices=choices, visible=bool(reward_models)),
        }
