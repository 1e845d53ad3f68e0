"""What one preference pair passes through in one step of ``flexdpo train``: ``python -m tests.trace_one_pair``.

The command runs as it is, on a tiny model, a file of one pair and a CPU. Counted are the package's functions (lambdas
too; a comprehension belongs to the function it stands in) that are called while the pair is on its way: from the
example's text to its token ids, and from the collator to the optimizer's step. What a run does once before that
(loading, preparing, planning, its proof) is left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import flexdpo
from flexdpo.cli import main
from flexdpo.data import encode
from flexdpo.training.batch import PackingCollator
from flexdpo.training.finite import StepGuard
from tests.conftest import VOCABULARY, preference_rows

_PACKAGE = str(Path(flexdpo.__file__).parent)
_NO_FUNCTIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<module>")


@dataclass
class Trace:
    """The package's functions in the order in which they were called."""

    calls: list[CodeType] = field(default_factory=list)

    @property
    def functions(self) -> int:
        """Distinct functions."""
        return len(set(self.calls))

    @property
    def files(self) -> int:
        """Files that they stand in."""
        return len({code.co_filename for code in self.calls})

    @property
    def changes(self) -> int:
        """How often a call is in another file than the call before it."""
        files = [code.co_filename for code in self.calls]
        return sum(a != b for a, b in pairwise(files))

    def lines(self) -> list[str]:
        """The calls file by file, in their order."""
        found: list[str] = []
        last = ""
        for code in self.calls:
            if code.co_filename != last:
                last = code.co_filename
                found.append(f"{Path(last).relative_to(_PACKAGE)}:")
            name = f" {getattr(code, 'co_qualname', code.co_name)}"
            if not found[-1].endswith(name):
                found[-1] += name
        return found


class _Recorder:
    """A profile function that records from certain calls on until certain others are over."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.recording = False
        self.steps = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(_PACKAGE):
            return
        if event == "call" and code in (_FROM_TEXT, _FROM_EXAMPLES):
            # the proof collates examples of its own, outside of any step
            self.recording = code is _FROM_TEXT or _called_by(frame, "get_batch_samples")
        if self.recording and event == "call" and code.co_name not in _NO_FUNCTIONS:
            self.trace.calls.append(code)
        if event == "return" and code in (_FROM_TEXT, _TO_STEP):
            self.recording = False
            self.steps += code is _TO_STEP


_FROM_TEXT = encode.tokenize_batch.__code__
_FROM_EXAMPLES = PackingCollator.__call__.__code__
_TO_STEP = StepGuard.on_pre_optimizer_step.__code__


def _called_by(frame: FrameType | None, name: str) -> bool:
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


def trace_one_pair(folder: Path, *, layers: int = 1, prove: bool = True) -> Trace:
    """Run ``flexdpo train`` for one step on one pair and record what the pair passes through."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w2"}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "model")
    (folder / "pair.jsonl").write_text(json.dumps(preference_rows(1)[0]) + "\n")
    names = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "pair.jsonl",
        "output_dir": folder / "out",
    }
    settings = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "use_cpu": "true", "report_to": "none"}
    options = {**names, **settings, "prove": str(prove).lower(), "disable_tqdm": "true"}
    recorder, before = _Recorder(), sys.getprofile()
    sys.setprofile(recorder)
    try:
        code = main(["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    finally:
        sys.setprofile(before)
    assert code == 0
    assert recorder.steps == 1
    return recorder.trace


if __name__ == "__main__":
    torch.set_num_threads(1)
    for proved in (True, False):
        with tempfile.TemporaryDirectory() as place:
            found = trace_one_pair(Path(place), prove=proved)
        if "-v" in sys.argv:
            sys.stdout.write("\n".join(found.lines()) + "\n")
        told = f"{found.functions} functions in {found.files} files, {found.changes} changes of file"
        sys.stdout.write(f"prove={proved}: {told}\n")
