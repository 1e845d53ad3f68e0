"""``flexdpo score``: log-probabilities, implicit rewards and accuracies of a dataset, to a parquet file."""

from flexdpo.commands.options import OptionParser, one_name, settings_of
from flexdpo.runs.settings import DataSettings


def parser() -> OptionParser:
    """The options."""
    from flexdpo.runs.score import ScoreSettings

    options = OptionParser(
        prog="flexdpo score",
        usage="flexdpo score MODEL DATA [--ref_model NAME] [--output_file FILE.parquet] [options]",
        description="Run every response of a dataset once, prompts shared, and write each row's log-probabilities, "
        "implicit rewards and accuracy. Interrupted, it goes on where it stopped. A training run takes the file as its "
        "precomputed reference: --precompute_ref_log_probs true --precompute_ref_cache_dir FILE.parquet.",
    )
    options.add_argument("model", metavar="MODEL", nargs="?", help="As --model_name_or_path.")
    options.add_argument("data", metavar="DATA", nargs="?", help="As --dataset_name.")
    options.add_settings(ScoreSettings, "the scores")
    options.add_settings(DataSettings, "data")
    return options


def run(argv: list[str]) -> int:
    """Run ``flexdpo score`` with the words after it; prints where the scores are."""
    found = parser().read(argv)
    if found.model_name_or_path is not None and found.data is None:
        # the one word that is left is no second model
        found.model, found.data = None, found.model
    found.model_name_or_path = one_name("model_name_or_path", found.model, found.model_name_or_path)
    found.dataset_name = one_name("dataset_name", found.data, found.dataset_name)
    from flexdpo.runs.score import ScoreSettings, score

    settings, data = settings_of(ScoreSettings, found), settings_of(DataSettings, found)
    settings.require_names()
    print(score(settings, data.train_data()))
    return 0
