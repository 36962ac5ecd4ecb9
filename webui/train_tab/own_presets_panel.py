"""The presets of users: saved from the form, listed, changed, and applied to the form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr
from gradio.blocks import Block

from engine.core.problems import Problem, Refusal, problem
from engine.runs import own_presets
from engine.runs.own_presets import OwnPreset
from webui import clicks, notices
from webui.events import QUIET
from webui.form.writing import control_values
from webui.panels import Updates, refusal_as_message
from webui.people import acting, asking
from webui.train_tab import own_presets_html
from webui.train_tab.panel import Context, Panel
from webui.train_tab.settings_panel import OWN, SettingsPanel

MAX_TEXT = 200  # characters of a name or an id that is looked at


class OwnPresetsPanel(Panel):
    """`layout` is below the choice of a preset, in which they are listed, too."""

    def __init__(self, context: Context, settings: SettingsPanel):
        super().__init__(context)
        self.settings = settings

    def layout(self) -> None:
        script = own_presets_html.ACT_JS + clicks.keep_folds_js("own")
        # Nobody's presets: this is what the page of each visitor is built with.
        html = own_presets_html.panel((), (), asking(), self.words)
        self.html = gr.HTML(html, js_on_load=script, elem_id="own-presets")

    def wire(self) -> None:
        inputs = [self.settings.preset, *self.settings.inputs]
        self.html.select(self.act, inputs, [self.message, *self.outputs], **QUIET)

    @property
    def outputs(self) -> list[Block]:
        """What shows which presets there are."""
        return [self.settings.preset, self.html]

    def first(self, chosen: str | None) -> Updates:
        """`listed` for a page that has just been opened: without a login and presets, it was built like that."""
        listing = own_presets.find(self.workplace.saves, asking())
        return self._listed(chosen, listing) if any(listing) or asking().name else {self.settings.preset: chosen}

    def listed(self, chosen: Any, report: str = "") -> Updates:
        """The presets that there are now; `chosen` is chosen, if it is still there."""
        return self._listed(chosen, own_presets.find(self.workplace.saves, asking()), report)

    def _listed(self, chosen: Any, listing: tuple[list[OwnPreset], list[Problem]], report: str = "") -> Updates:
        presets, broken = listing
        choices = self.settings.preset_choices(presets)
        known = chosen if chosen in (value for _, value in choices) else None
        return {
            self.settings.preset: gr.update(choices=choices, value=known),
            self.html: own_presets_html.panel(presets, broken, asking(), self.words, report),
        }

    @refusal_as_message
    def act(self, event: gr.EventData, chosen: Any, *held: Any) -> Updates:
        """Do what a button says. Raises Refusal."""
        about: Mapping[str, Any] = event._data if isinstance(event._data, Mapping) else {}
        what = about.get("do")
        if what == "save":
            return self._save(about, chosen, held)
        if what not in CHANGES:
            return gr.skip()
        preset = own_presets.get(self.workplace.saves, str(about.get("id"))[:MAX_TEXT], asking())
        with acting(self.workplace.saves, "change-preset", f"{preset.name}: {what}", preset.by):
            CHANGES[what](self, preset, str(about.get("name"))[:MAX_TEXT])
        return {self.message: notices.toast(self.words(f"preset-done-{what}", name=preset.name))} | self.listed(chosen)

    def _save(self, about: Mapping[str, Any], chosen: Any, held: tuple[Any, ...]) -> Updates:
        person, saves, name = asking(), self.workplace.saves, str(about.get("name", ""))[:MAX_TEXT]
        with acting(saves, "save-preset", name):
            spec, unreadable = self.settings.read(held)
            if unreadable:
                raise Refusal(problem("preset-unread", count=len(unreadable)))
            start = self.settings.start(chosen) if about.get("changed") is True else None
            settings = own_presets.settings_of(spec, start, about.get("places") is True)
            shared = not person.name or about.get("shared") is True
            preset, replaced = own_presets.save(saves, name, person.name, shared, settings)
        message = self.words("preset-replaced" if replaced else "preset-saved", name=preset.name)
        return {self.message: notices.toast(message)} | self.listed(chosen)

    def apply(self, chosen: str, held: tuple[Any, ...]) -> Updates:
        """The settings of a preset in the form, whose other settings stay as they are. Raises Refusal."""
        preset = own_presets.get(self.workplace.saves, chosen.removeprefix(OWN)[:MAX_TEXT], asking())
        applied = own_presets.applied(preset, self.settings.read(held)[0])
        values, paths = control_values(applied.spec), own_presets.paths_of(preset, applied)
        controls = self.settings.form.controls.items()
        message = self.words("preset-applied", name=preset.name, count=len(applied.changes))
        if applied.problems:
            message += " " + self.words("preset-lost", count=len(applied.problems))
        return (
            {self.message: notices.toast(message)}
            | {control: values[name] for name, control in controls if name.split(":")[0] in paths}
            | self.listed(chosen, own_presets_html.report(preset.name, applied, self.words))
        )

    def _rename(self, preset: OwnPreset, name: str) -> None:
        own_presets.change(self.workplace.saves, preset, name=name)

    def _share(self, preset: OwnPreset, _name: str) -> None:
        own_presets.change(self.workplace.saves, preset, shared=True)

    def _keep(self, preset: OwnPreset, _name: str) -> None:
        own_presets.change(self.workplace.saves, preset, shared=False)

    def _delete(self, preset: OwnPreset, _name: str) -> None:
        own_presets.delete(self.workplace.saves, preset)


CHANGES: dict[Any, Callable[[OwnPresetsPanel, OwnPreset, str], None]] = {
    "rename": OwnPresetsPanel._rename,
    "share": OwnPresetsPanel._share,
    "keep": OwnPresetsPanel._keep,
    "delete": OwnPresetsPanel._delete,
}
