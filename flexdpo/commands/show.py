"""``flexdpo show``: pictures of a packed row and of a batch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexdpo.commands.options import OptionParser
from flexdpo.data.load import load_preference_dataset
from flexdpo.errors import FlexdpoError
from flexdpo.estimate.sources import find_tokenizer
from flexdpo.show.overview import VIEWS, draw_overview, first_row, picture_block_size
from flexdpo.show.packing import batch_layouts
from flexdpo.show.sources import example_groups, groups_of_dataset, read_lengths
from flexdpo.show.text import overview_text

if TYPE_CHECKING:
    from flexdpo.layout.groups import Group


@dataclass
class ShowArguments:
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
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    max_length: int | None = field(default=1024, metadata={"help": "Longest prompt plus response; 0 for no limit."})
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
        (ShowArguments,),
        prog="flexdpo show",
        usage="flexdpo show [DATASET --tokenizer NAME | --lengths FILE.json] [--output FILE.png] [--text] [options]",
        description="Draw the tries of a packed row, its attention mask with the tiles that a kernel skips, masks or "
        "runs whole, and how a batch is packed. Without a dataset, the built-in example is drawn.",
    )
    options.add_argument("dataset", nargs="?", help="A file, a folder or a hub name, as flexdpo train takes it.")
    if {"-h", "--help"} & set(argv):
        options.print_help()
        return 0
    arguments, rest = options.parse_with_config(argv)
    groups = _groups(arguments, rest.dataset)
    if arguments.text:
        print(_text(arguments, groups))
    if arguments.output is not None or not arguments.text:
        path = draw_overview(
            groups,
            arguments.output or "flexdpo-rows.png",
            view=arguments.view,
            max_tokens_per_row=arguments.max_tokens_per_row,
            sharing=arguments.sharing,
            pad_to_multiple_of=arguments.pad_to_multiple_of,
            block_size=arguments.block_size,
        )
        print(f"written to {path}")
    return 0


def _groups(arguments: ShowArguments, dataset: str | None) -> list[Group]:
    if dataset is not None and arguments.lengths is not None:
        raise FlexdpoError("give a dataset or --lengths, not both")
    if arguments.lengths is not None:
        return read_lengths(arguments.lengths)
    if dataset is None:
        return example_groups(arguments.groups, arguments.seed)
    if arguments.tokenizer is None:
        raise FlexdpoError("a dataset needs --tokenizer NAME: which tokens it has depends on it")
    tokenizer = find_tokenizer(arguments.tokenizer)
    data = load_preference_dataset(dataset, split=arguments.split, config_name=arguments.config_name)
    return groups_of_dataset(
        data, tokenizer, max_length=arguments.max_length or None, first=arguments.first, groups=arguments.groups
    )


def _text(arguments: ShowArguments, groups: list[Group]) -> str:
    row = first_row(
        groups,
        arguments.max_tokens_per_row,
        sharing=arguments.sharing,
        pad_to_multiple_of=arguments.pad_to_multiple_of,
    )
    layouts = batch_layouts(groups, arguments.max_tokens_per_row, sharing=arguments.sharing)
    size = arguments.block_size or picture_block_size(int(row.subtree_end.shape[-1]))
    width = max(40, shutil.get_terminal_size((120, 40)).columns)
    return overview_text(row, layouts, width=width, block_size=size)
