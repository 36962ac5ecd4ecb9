"""The box that finds a setting by its words. The page's script does it (settings.js): nothing is asked of the server
while somebody types. Its key `/` can be switched off in each browser, as WCAG 2.1.4 asks of single characters: software
that types what somebody says would press it by accident."""

from __future__ import annotations

from html import escape

import gradio as gr

from webui.train_tab.panel import Panel
from webui.train_tab.settings_index import index_file


class SearchPanel(Panel):
    def layout(self) -> None:
        words = self.words

        def text(code: str) -> str:
            return escape(words(code))

        none = escape(words("search-none", text="{text}"))  # which the script fills in
        gr.HTML(
            f'<div class="finder" role="search"><label for="find-setting">{text("search")}</label>'
            '<div class="box"><input id="find-setting" type="text" role="combobox" aria-expanded="false" '
            'aria-controls="settings-matching" aria-autocomplete="list" aria-describedby="find-help" '
            f'aria-keyshortcuts="/" autocomplete="off" spellcheck="false" placeholder="{text("search-placeholder")}" '
            f'data-index="{index_file(words.language)[0]}" data-none="{none}" '
            f'data-failed="{text("search-failed")}"><button type="button" id="search-key" aria-pressed="true" '
            f'aria-label="{text("search-key")}" title="{text("search-key")}">/</button>'
            f'<ul id="settings-matching" role="listbox" aria-label="{text("search")}" hidden></ul></div>'
            f'<p id="find-help">{text("search-help")}</p><p class="heard" role="status"></p></div>',
            elem_id="finder",
        )
