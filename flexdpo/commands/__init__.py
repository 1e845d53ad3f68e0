"""The commands behind ``flexdpo``, one module each."""

# each has `parser()` and `run(argv) -> exit code`, and is imported when it is called
COMMANDS = {
    "train": "train with DPO: without arguments the built-in example, or your model on your data",
    "check": "say whether a model is exact on shared, packed rows, or refused and why",
    "estimate": "predict what flexdpo would do for your dataset: tokens, speed-up, memory, settings",
    "show": "draw a row of your data: its trie, its mask, its tiles, and how a batch is packed",
    "score": "log-probabilities, implicit rewards and accuracies of your data, to a parquet file",
    "bench": "time a training step on this machine: shared prompts against the ordinary ways",
    "env": "print versions and devices, for bug reports",
    "completion": "print what completes these commands and their options in bash or zsh",
    "results": "write the files of bench as tables into README, next to the paper's figures",
}
