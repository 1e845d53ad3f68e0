"""``flexdpo results``: the committed measurements as tables in README."""

from flexdpo.commands.options import OptionParser


def parser() -> OptionParser:
    """The options."""
    options = OptionParser(
        prog="flexdpo results",
        description="Write every result file in a folder as a table between two marker comments in "
        "README, next to the figures that the paper published.",
    )
    options.add_argument("folder", metavar="FOLDER", nargs="?", default="notebooks/results", help="result files")
    options.add_argument("--readme", metavar="FILE", default="README.md", help="the file to write into")
    options.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if the file does not say what the results say"
    )
    return options


def run(argv: list[str]) -> int:
    """Run ``flexdpo results`` with the words after it; returns 1 where ``--check`` finds README out of date."""
    options = parser().parse_args(argv)
    from flexdpo.bench.results_page import load_files, render_page, update_page

    results = load_files(options.folder)
    current = update_page(options.readme, render_page(results), check=options.check)
    if options.check and not current:
        print(f"{options.readme} is out of date; run flexdpo results {options.folder} --readme {options.readme}")
        return 1
    tables = f"{len(results)} table" + ("s" if len(results) != 1 else "")
    print(f"{options.readme}: {tables} from {options.folder}, {'already there' if current else 'written'}")
    return 0
