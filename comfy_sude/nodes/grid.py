"""SuDe Grid: pictures side by side, with labels."""

from comfy_api.latest import io, ui

from .. import captions, grid
from .sockets import CATEGORY

SOCKETS = 8  # for pictures


class SuDeGrid(io.ComfyNode):
    """IMAGE lists and labels -> one picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, outputs and help of the node."""
        more = [
            io.Image.Input(f"images_{index}", optional=True, tooltip="More pictures, after those above.")
            for index in range(2, SOCKETS + 1)
        ]
        return io.Schema(
            node_id="SuDeGrid",
            display_name="SuDe Grid",
            category=CATEGORY,
            description="Puts pictures into one labelled grid: before and after, one row a baseline, or what SuDe "
            "Sweep made of every w_s and prompt.",
            search_aliases=["image grid", "xy plot", "compare", "contact sheet", "before after"],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="Pictures: a batch, or a list as it comes from a sampler after SuDe Sweep. Each batch of "
                    "several sockets is a row.",
                ),
                io.String.Input(
                    "row_labels",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One a line. Or connect the label output of SuDe Sweep: pictures then go to their rows.",
                ),
                io.String.Input(
                    "column_labels",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One a line; their number is the number of columns. Or connect the prompt output of SuDe "
                    "Sweep: pictures then go to their columns.",
                ),
                io.String.Input("title", default="", optional=True, tooltip="Stands above the grid."),
                io.Int.Input(
                    "columns", default=0, min=0, max=100, optional=True, tooltip="How many; 0 finds a good number."
                ),
                io.Int.Input(
                    "cell",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="Longer side of each picture in pixels; 0 keeps the pictures' size (small ones are "
                    "enlarged to 192).",
                ),
                *more,
            ],
            outputs=[io.Image.Output(display_name="grid", tooltip="The whole grid as one picture, for Save Image.")],
        )

    @classmethod
    def execute(cls, images, row_labels=(), column_labels=(), title=(), columns=(), cell=(), **more) -> io.NodeOutput:
        """Arrange and draw. Every input comes as a list."""
        batches = list(images)
        for index in range(2, SOCKETS + 1):
            batches += more.get(f"images_{index}") or []
        batches = [batch for batch in batches if batch is not None and len(batch)]
        if not batches:
            raise ValueError("images is empty: connect at least one picture.")
        labels = labels_of("row_labels", row_labels), labels_of("column_labels", column_labels)
        layout = grid.arrange(batches, *labels, first(columns, 0))
        heading = captions.normalize(first(title, ""))
        captions.check_text("title", heading)
        picture = grid.draw(layout, heading, first(cell, 0))
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture, cls=cls))


def labels_of(name: str, given) -> list[str]:
    """Labels from what came in: a list with one label each, or one text with a label in every line."""
    texts = [str(text) for text in given if text is not None]
    for text in texts:
        captions.check_text(name, text)
    if len(texts) == 1:
        texts = [line for line in texts[0].splitlines() if line.strip()]
    return [captions.normalize(text) for text in texts]


def first(given, default):
    """The one value of an input that is no list to its node."""
    return given[0] if given else default
