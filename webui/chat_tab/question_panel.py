"""The box for the question, and the buttons below it."""

from __future__ import annotations

import gradio as gr
from gradio.blocks import Block
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from engine.data.images import IMAGE_SUFFIXES
from engine.serving.attachments import MAX_SIDE, image_bytes
from engine.serving.conversation_tree import Conversation, Turn
from webui.chat_tab import turns_html
from webui.chat_tab.panel import Panel
from webui.chat_tab.questions import called_tool_last
from webui.panels import Updates

UPLOADS = str(get_upload_folder())  # gradio's folder for uploads


class QuestionPanel(Panel):
    """The buttons are wired by other panels."""

    def layout(self) -> None:
        words = self.words
        with gr.Column(elem_classes="ask"):
            self.prompt = gr.Textbox(
                placeholder=words("chat-prompt"),
                show_label=False,
                container=False,
                lines=1,
                max_lines=10,
                elem_id="prompt",
                label=words("chat-prompt"),
            )
            self.images = gr.File(
                file_count="multiple",
                file_types=list(IMAGE_SUFFIXES),
                label=f"{words('chat-images')} · {words('chat-images-help', side=MAX_SIDE)}",
                height=110,
                visible=False,
                elem_id="chat-images",
            )
            self.is_tool_result = gr.Checkbox(True, label=words("chat-result"), visible=False, elem_id="chat-result")
            with gr.Row(elem_classes="buttons"):
                self.send = gr.Button(
                    words("chat-send"), variant="primary", size="sm", elem_id="send", elem_classes="acts"
                )
                self.stop = gr.Button(words("chat-stop"), size="sm", visible=False, elem_id="chat-stop")
                self.again = gr.Button(words("chat-again"), size="sm", elem_id="chat-again", elem_classes="acts")
                self.new = gr.Button(words("chat-new"), size="sm", elem_id="chat-new")
                self.clear = gr.Button(words("chat-clear"), size="sm", elem_id="chat-clear")
                self.export = gr.HTML(elem_id="chat-export")

    @property
    def outputs(self) -> list[Block]:
        """The components that depend on the conversation."""
        return [self.export, self.is_tool_result]

    def for_conversation(self, conversation: Conversation, answering: bool) -> Updates:
        """Offer the conversation for download, and to enter the result of a tool if one was called last."""
        called = not answering and called_tool_last(conversation)
        return {
            self.export: turns_html.export_html(conversation, self.words),
            self.is_tool_result: gr.update(visible=called, value=True),
        }

    def for_models(self, reads_images: bool) -> Updates:
        """Offer to attach images if a selected model reads them."""
        return {self.images: gr.update(visible=reads_images) if reads_images else gr.update(visible=False, value=None)}

    def put_back(self, turn: Turn) -> Updates:
        """Put a question back into the box, with its images."""
        files = [save_bytes_to_cache(image_bytes(url), "image.jpg", UPLOADS) for url in turn.images]
        return {self.prompt: turn.question, self.images: gr.update(value=files or None)}
