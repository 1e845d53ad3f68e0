"""``flexdpo show``: pictures of a packed row and of a batch."""

import shutil
from dataclasses import dataclass, fields

from flexdpo.commands.options import OptionParser, TokenizerOptions, one_name, settings_of
from flexdpo.data.pictures import holds_images
from flexdpo.errors import FlexdpoError, nearest
from flexdpo.layout.groups import Group
from flexdpo.layout.packing import pack
from flexdpo.layout.sequences import require_count
from flexdpo.objective.loss_types import setting
from flexdpo.runs.settings import DataSettings
from flexdpo.show.draw import VIEWS, overview_figure
from flexdpo.show.packing import batch_layouts
from flexdpo.show.plots import save_figure
from flexdpo.show.text import overview_text


@dataclass
class ShowSettings:
    """What to draw, and where to."""

    lengths: str | None = setting(
        None,
        'A JSON file instead of a dataset: [{"prompt": 12, "responses": [5, 3]}, ...]; [4, [5, 3]] in place of a '
        "response is a beginning of 4 tokens that two responses share.",
    )
    output: str | None = setting(None, "The picture: .png, .pdf, .svg; by default flexdpo-rows.png, without --text.")
    text: bool = setting(False, "Print it to the terminal.")
    view: str = setting("all", f"One of {', '.join(VIEWS)}.")
    groups: int = setting(4, "Rows of the dataset, or groups of the example, to draw.")
    first: int = setting(0, "First of those rows of the dataset, counted from 0.")
    max_length: int = setting(1024, "Longest prompt plus response; 0 for no limit.")
    max_tokens_per_row: int | None = setting(None, "Longest packed row; by default one row.")
    sharing: str = setting("group", "group, or step: across examples too.")
    pad_to_multiple_of: int = setting(1, "Pad rows to a multiple of this many tokens.")
    block_size: int | None = setting(None, "Side of a tile; by default 128, and less for short rows.")
    seed: int = setting(0, "Of the built-in example.")


def parser() -> OptionParser:
    """The options."""
    options = OptionParser(
        prog="flexdpo show",
        usage="flexdpo show [DATASET --tokenizer NAME | --lengths FILE.json] [--output FILE.png] [--text] [options]",
        description="Draw the tries of a packed row, its attention mask with the tiles that a kernel skips, masks or "
        "runs whole, and how a batch is packed. Without a dataset, the built-in example is drawn.",
    )
    options.add_argument("dataset", nargs="?", help="As --dataset_name.")
    options.add_settings(TokenizerOptions, "model")
    options.add_settings(DataSettings, "data")
    options.add_settings(ShowSettings, "the picture")
    return options


def run(argv: list[str]) -> int:
    """Run ``flexdpo show`` with the words after it."""
    options = parser()
    found = options.read(argv)
    found.dataset_name = one_name("dataset_name", found.dataset, found.dataset_name)
    settings = settings_of(ShowSettings, found)
    if settings.view not in VIEWS:
        hint = nearest(settings.view, VIEWS)
        raise FlexdpoError(f"--view {settings.view!r} is unknown{hint}; use {', '.join(VIEWS)}")
    of_data = {each.name for kind in (DataSettings, TokenizerOptions) for each in fields(kind)} | {
        "first",
        "max_length",
    }
    if settings.lengths is not None and not (found.dataset_name or found.datasets):
        options.require_effect(found, of_data | {"groups", "seed"}, "with --lengths")
    elif not (found.dataset_name or found.datasets):
        options.require_effect(found, of_data, "on the built-in example, without a dataset")
    else:
        options.require_effect(found, {"seed"}, "on a dataset; --first chooses its rows")
    if settings.text and settings.output is None:
        options.require_effect(found, {"view"}, "on --text; name a picture with --output")
    if settings.block_size is not None:
        require_count("--block_size", settings.block_size)
    groups = _groups(settings, settings_of(DataSettings, found), settings_of(TokenizerOptions, found))
    length, sharing = settings.max_tokens_per_row, settings.sharing
    row = pack(groups, length, sharing=sharing, pad_to_multiple_of=settings.pad_to_multiple_of)[0]
    layouts = batch_layouts(groups, length, sharing=sharing)
    if settings.text:
        width = max(40, shutil.get_terminal_size((120, 40)).columns)
        print(overview_text(row, layouts, width=width, block_size=settings.block_size))
    if settings.output is not None or not settings.text:
        figure = overview_figure(row, layouts, view=settings.view, block_size=settings.block_size)
        print(f"written to {save_figure(figure, settings.output or 'flexdpo-rows.png')}")
    return 0


def _groups(settings: ShowSettings, data: DataSettings, tokens: TokenizerOptions) -> list[Group]:
    from flexdpo.data.tokenize import group_from_row, tokenize_preferences
    from flexdpo.show.sources import example_groups, read_lengths

    named = data.dataset_name is not None or bool(data.datasets)
    if named and settings.lengths is not None:
        raise FlexdpoError("give a dataset or --lengths, not both")
    if settings.lengths is not None:
        return read_lengths(settings.lengths)
    if settings.groups < 1:
        raise FlexdpoError(f"--groups must be at least 1, got {settings.groups}")
    if not named:
        return example_groups(settings.groups, settings.seed)
    if tokens.tokenizer is None and tokens.model_name_or_path is None:
        raise FlexdpoError(
            "a dataset needs --tokenizer NAME, since its tokens depend on it; give that, or --model_name_or_path NAME"
        )
    found, first = data.train_data(), settings.first
    tokenizer, longest = tokens.load_tokenizer(images=holds_images(found)), settings.max_length or None
    if not 0 <= first < len(found):
        raise FlexdpoError(f"--first {first}: the dataset has the rows 0 to {len(found) - 1}")
    some = found.select(range(first, min(first + settings.groups, len(found))))
    tokenised = tokenize_preferences(some, tokenizer, max_length=longest, name="data")
    print(tokenised.report.summary())
    return [group_from_row(row) for row in tokenised.dataset]
