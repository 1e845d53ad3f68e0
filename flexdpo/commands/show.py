"""``flexdpo show``: pictures of a packed row and of a batch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexdpo.commands.options import DatasetOptions, OptionParser, settings_of
from flexdpo.errors import FlexdpoError
from flexdpo.layout.packing import pack
from flexdpo.show.overview import VIEWS, draw_overview, picture_block_size
from flexdpo.show.packing import batch_layouts
from flexdpo.show.text import overview_text

if TYPE_CHECKING:
    from flexdpo.layout.groups import Group


@dataclass(frozen=True)
class ShowSettings(DatasetOptions):
    """What to draw, and where to."""

    tokenizer: str | None = field(
        default=None, metadata={"help": "With a dataset: a folder with a tokenizer or a model, or a hub name."}
    )
    lengths: str | None = field(
        default=None,
        metadata={
            "help": 'A JSON file instead of a dataset: [{"prompt": 12, "responses": [5, 3]}, ...]; [4, [5, 3]] in '
            "place of a response is a beginning of 4 tokens that two responses share."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "The picture: .png, .pdf, .svg; by default flexdpo-rows.png, without --text."}
    )
    text: bool = field(default=False, metadata={"help": "Print it to the terminal."})
    view: str = field(default="all", metadata={"help": f"One of {', '.join(VIEWS)}."})
    groups: int = field(default=4, metadata={"help": "Rows of the dataset, or groups of the example, to draw."})
    first: int = field(default=0, metadata={"help": "First of those rows of the dataset, counted from 0."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt plus response; 0 for no limit."})
    max_tokens_per_row: int | None = field(default=None, metadata={"help": "Longest packed row; by default one row."})
    sharing: str = field(default="group", metadata={"help": "group, or step: across examples too."})
    pad_to_multiple_of: int = field(default=1, metadata={"help": "Pad rows to a multiple of this many tokens."})
    block_size: int | None = field(
        default=None, metadata={"help": "Side of a tile; by default 128, and less for short rows."}
    )
    seed: int = field(default=0, metadata={"help": "Of the built-in example."})


def run(argv: list[str]) -> int:
    """Run ``flexdpo show`` with the words after it."""
    options = OptionParser(
        prog="flexdpo show",
        usage="flexdpo show [DATASET --tokenizer NAME | --lengths FILE.json] [--output FILE.png] [--text] [options]",
        description="Draw the tries of a packed row, its attention mask with the tiles that a kernel skips, masks or "
        "runs whole, and how a batch is packed. Without a dataset, the built-in example is drawn.",
    )
    options.add_argument("dataset", nargs="?", help="A file, a folder or a hub name, as flexdpo train takes it.")
    options.add_settings(ShowSettings)
    found = options.read(argv)
    settings = settings_of(ShowSettings, found)
    groups = _groups(settings, found.dataset)
    length, sharing, multiple = settings.max_tokens_per_row, settings.sharing, settings.pad_to_multiple_of
    row = pack(groups, length, sharing=sharing, pad_to_multiple_of=multiple)[0]
    layouts = batch_layouts(groups, length, sharing=sharing)
    size = settings.block_size or picture_block_size(int(row.subtree_end.shape[-1]))
    if settings.text:
        width = max(40, shutil.get_terminal_size((120, 40)).columns)
        print(overview_text(row, layouts, width=width, block_size=size))
    if settings.output is not None or not settings.text:
        path = draw_overview(row, layouts, settings.output or "flexdpo-rows.png", view=settings.view, block_size=size)
        print(f"written to {path}")
    return 0


def _groups(settings: ShowSettings, dataset: str | None) -> list[Group]:
    from flexdpo.show.sources import example_groups, groups_of_dataset, read_lengths

    if dataset is not None and settings.lengths is not None:
        raise FlexdpoError("give a dataset or --lengths, not both")
    if settings.lengths is not None:
        return read_lengths(settings.lengths)
    if dataset is None:
        return example_groups(settings.groups, settings.seed)
    if settings.tokenizer is None:
        raise FlexdpoError("a dataset needs --tokenizer NAME: which tokens it has depends on it")
    from flexdpo.training.model_loading import load_tokenizer

    tokenizer, longest = load_tokenizer(settings.tokenizer), settings.max_length or None
    data = settings.load(dataset)
    return groups_of_dataset(data, tokenizer, max_length=longest, first=settings.first, groups=settings.groups)
