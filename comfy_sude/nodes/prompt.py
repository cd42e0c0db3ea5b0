"""SuDe Prompt: the exact caption, in the template the subject was trained with."""

from comfy_api.latest import io

from ..subject import Subject
from .sockets import CATEGORY, SubjectSocket, expect


class SuDePrompt(io.ComfyNode):
    """Caption builder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        return io.Schema(
            node_id="SuDePrompt",
            display_name="SuDe Prompt",
            category=CATEGORY,
            description="Writes the prompt for a trained subject: 'running' and 'on the beach' become "
            "'photo of a running sks dog on the beach'.",
            inputs=[
                SubjectSocket.Input("subject", tooltip="From SuDe Fine-Tune."),
                io.String.Input(
                    "attribute", default="running", tooltip="Stands before the subject: running, golden, tiny."
                ),
                io.String.Input("context", default="", tooltip="Stands at the end: on the beach, wearing a hat."),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="For CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, subject, attribute="", context="") -> io.NodeOutput:
        """The caption."""
        expect(subject, Subject, "subject", "SuDe Fine-Tune or SuDe Load Subject")
        return io.NodeOutput(subject.prompt(attribute, context))
