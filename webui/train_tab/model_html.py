"""What is known about the chosen model, and about the packages that settings need, as HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from html import escape

from engine.core.problems import Problem
from engine.launch import engine_choice
from engine.launch.workspace import DEMO_MODEL, DEMO_VISION_MODEL, Workplace
from engine.models.conversion import offered
from engine.models.discovery import SMOLLM2
from engine.models.facts import ModelFacts
from engine.models.structure import structure_of
from engine.preflight.package_checks import QUANTIZER, optimizer_modules
from engine.spec.run_spec import RunSpec
from webui import notices
from webui.form.settings import choices, element_id, part_id
from webui.numbers import human, size
from webui.train_tab.choices import local_model
from webui.words import Words

QUANTIZATION, OPTIMIZER = "model.quantization", "training.optim"


def model_facts(name_or_path: str, workplace: Workplace, words: Words) -> str:
    """One line about the chosen model. A folder outside the model folders is not read."""
    if not name_or_path:
        return f'<p class="quiet">{escape(words("fact-none"))}</p>'
    model = local_model(name_or_path, workplace)
    if not model and (source := offered(name_or_path, workplace.model_roots)):
        facts_of_file = (source.file.name, size(source.file.stat().st_size))
        return f'<p class="chips">{"".join(f"<span>{escape(chip)}</span>" for chip in facts_of_file)}</p>'
    if not model:
        return f'<p class="quiet">{escape(words("fact-hub"))}</p>'
    facts = [
        model.architecture or model.model_type,
        model.parameters and words("fact-parameters", count=human(model.parameters)),
        model.bytes and size(model.bytes),
        model.dtype,
        model.quantized,
        model.context_length and words("fact-context", tokens=f"{model.context_length:,}"),
        words("fact-template" if model.has_chat_template else "fact-no-template"),
    ]
    chips = "".join(f"<span>{escape(str(fact))}</span>" for fact in facts if fact)
    return f'<p class="chips">{chips}</p>{_how_to_get_more_models(model, workplace, words)}'


def _how_to_get_more_models(model: ModelFacts, workplace: Workplace, words: Words) -> str:
    """Below a demo model's facts: how to get a real one, until the small real one exists."""
    demos = (DEMO_MODEL, DEMO_VISION_MODEL)
    if model.path not in demos or SMOLLM2.exists():
        return ""
    folder = next((root for root in workplace.models if root not in (*demos, SMOLLM2)), None)
    own = words("fact-own-model", folder=folder) if folder else words("fact-own-model-elsewhere")
    between = " " if words.language == "en" else ""
    sentence = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(f"{words('fact-demo')}{between}{own}"))
    return f'<p class="quiet">{sentence}</p>'


def unusable_packages(unusable: Mapping[str, Problem] | None, words: Words) -> str:
    """Why quantization, or an optimizer of bitsandbytes, cannot be chosen here; that it is being tried; or nothing."""
    if unusable is None:
        return f'<p class="quiet" role="status">{escape(words("bitsandbytes-tried"))}</p>'
    named: dict[str, list[str]] = {}  # one sentence for all with the same failure
    for check, error in unusable.items():
        sentence = notices.sentence(replace(error, values={**error.values, "what": "{what}"}), words)
        label = words.choice(QUANTIZATION, check) if check in choices(QUANTIZATION) else words("optimizers-8bit")
        named.setdefault(sentence, []).append(label)
    texts = (sentence.replace("{what}", " / ".join(names)) for sentence, names in named.items())
    return "".join(f'<p class="doubtful">{escape(text)}</p>' for text in texts)


def disabled_choices_css(unusable: Mapping[str, Problem], words: Words) -> str:
    """A style sheet that greys out the choices that cannot work here; choosing one anyway is refused."""
    greyed = [
        f'#{element_id(QUANTIZATION)} label:has(input[value="{check}"])'
        for check in unusable
        if check in choices(QUANTIZATION)
    ]
    if "optimizer" in unusable:
        greyed += [
            f'#{element_id(OPTIMIZER)} li[aria-label="{words.choice(OPTIMIZER, name)}"]'
            for name in choices(OPTIMIZER)
            if QUANTIZER in optimizer_modules(name)
        ]
    return f"<style>{','.join(greyed)}{{opacity:.4;pointer-events:none}}</style>" if greyed else ""


def hidden_parts_css(spec: RunSpec, workplace: Workplace) -> str:
    """A style sheet that hides settings that do not apply here and are unchanged: those of vision parts if the chosen
    model has none, and what is about several machines if runs start on this one."""
    model = local_model(spec.model.model_name_or_path, workplace)
    hidden = []
    if not (spec.vision.first_change or (model and model.has_towers and structure_of(model).vision)):
        hidden.append(part_id("vision"))
    if spec.hardware.num_machines == 1 and engine_choice.is_local(workplace.saves):
        hidden.append(element_id("hardware.num_machines"))
        if getattr(spec.hardware.strategy, "sharding", "auto") == "auto":
            hidden.append(element_id("hardware.strategy.sharding"))
    return f"<style>{','.join(f'#{id}' for id in hidden)}{{display:none}}</style>" if hidden else ""
