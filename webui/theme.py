"""The look of the page: one accent colour, system fonts, light and dark mode, and nothing loaded from other servers."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from webui.form.controls import kinds_css

FOLDER = Path(__file__).parent
SCRIPTS = ("page.js", "settings.js", "tour.js")
ACCENT = "#c2410c"  # the colour of a furnace
SANS = (
    "ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif",
)  # fmt: skip
MONO = (
    "ui-monospace", "SF Mono", "Cascadia Mono", "JetBrains Mono",
    "Consolas", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "monospace",
)  # fmt: skip

FURNACE = gr.themes.Color(
    "#fff7ed", "#ffedd5", "#fed7aa", "#fdba74", "#fb923c", "#ea580c",
    ACCENT, "#9a3412", "#7c2d12", "#5f2410", "#431407", name="furnace",
)  # fmt: skip
STONE = gr.themes.Color(
    "#fafaf9", "#f5f5f4", "#e7e5e4", "#d6d3d1", "#a8a29e", "#78716c",
    "#57534e", "#44403c", "#292524", "#1c1917", "#0c0a09", name="stone",
)  # fmt: skip


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=FURNACE, secondary_hue=FURNACE, neutral_hue=STONE, font=SANS, font_mono=MONO,
        radius_size=gr.themes.sizes.radius_md, text_size=gr.themes.sizes.text_md,
    ).set(
        body_background_fill="#faf9f7", body_background_fill_dark="#161412",
        body_text_color="#1c1917", body_text_color_dark="#e7e5e4",
        body_text_color_subdued="#6b645e", body_text_color_subdued_dark="#a39d97",
        background_fill_primary="#ffffff", background_fill_primary_dark="#1f1c1a",
        background_fill_secondary="#f5f4f1", background_fill_secondary_dark="#262220",
        border_color_primary="#e4e0db", border_color_primary_dark="#38332f",
        block_background_fill="transparent", block_background_fill_dark="transparent",
        block_border_width="0px", block_border_width_dark="0px", block_shadow="none", block_shadow_dark="none",
        block_padding="0px", block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        block_title_text_weight="550", block_title_text_size="13px", block_title_text_color="*body_text_color",
        block_info_text_size="12px", block_info_text_color="*body_text_color_subdued",
        block_radius="8px", panel_background_fill="transparent", panel_background_fill_dark="transparent",
        panel_border_width="0px",
        input_background_fill="#ffffff", input_background_fill_dark="#1f1c1a",
        input_border_color="#d9d4ce", input_border_color_dark="#423c37", input_border_width="1px",
        input_border_color_focus=ACCENT, input_border_color_focus_dark="#ea580c",
        input_shadow="none", input_shadow_focus="0 0 0 3px #c2410c22", input_shadow_focus_dark="0 0 0 3px #ea580c33",
        input_radius="7px", input_padding="8px 11px", input_text_size="14px",
        button_primary_background_fill=ACCENT, button_primary_background_fill_dark=ACCENT,
        button_primary_background_fill_hover="#9a3412", button_primary_background_fill_hover_dark="#d9480f",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
        button_primary_border_color="transparent", button_primary_border_color_dark="transparent",
        button_primary_shadow="none", button_primary_shadow_hover="none",
        button_secondary_background_fill="#ffffff", button_secondary_background_fill_dark="#262220",
        button_secondary_background_fill_hover="#f5f4f1", button_secondary_background_fill_hover_dark="#302b28",
        button_secondary_border_color="#d9d4ce", button_secondary_border_color_dark="#423c37",
        button_secondary_text_color="*body_text_color", button_secondary_text_color_dark="*body_text_color",
        button_border_width="1px", button_large_radius="8px", button_small_radius="7px", button_medium_radius="7px",
        button_large_text_weight="600", button_small_text_weight="500", button_medium_text_weight="500",
        button_cancel_background_fill="#b91c1c", button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover="#991b1b", button_cancel_background_fill_hover_dark="#dc2626",
        button_cancel_text_color="#ffffff", button_cancel_text_color_dark="#ffffff",
        button_cancel_border_color="transparent", button_cancel_border_color_dark="transparent",
        checkbox_background_color_selected=ACCENT, checkbox_background_color_selected_dark=ACCENT,
        checkbox_border_color_selected=ACCENT, checkbox_border_color_selected_dark=ACCENT,
        checkbox_border_color="#b9b2aa", checkbox_border_color_dark="#5a534d",
        checkbox_border_width="1px", checkbox_border_color_focus=ACCENT, checkbox_border_color_focus_dark=ACCENT,
        slider_color=ACCENT, slider_color_dark="#ea580c",
        link_text_color=ACCENT, link_text_color_dark="#fb923c", link_text_color_hover="#9a3412",
        link_text_color_hover_dark="#fdba74",
        layout_gap="16px", form_gap_width="0px", section_header_text_size="13px",
    )  # fmt: skip


def css() -> str:
    """The page's style sheet, and the rules for the spec's kinds."""
    return (FOLDER / "page.css").read_text(encoding="utf-8") + kinds_css()


def head() -> str:
    """The content of the page's <head>: its scripts, as one."""
    return f"<script>{''.join((FOLDER / name).read_text(encoding='utf-8') for name in SCRIPTS)}</script>"
