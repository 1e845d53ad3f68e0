"""The task: given the code that leads up to a function, prefer its own body to another function's."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flexdpo.errors import FlexdpoError
from flexdpo.example.model import train_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from flexdpo.example.stdlib import SourceFunction, StandardLibrary

MAX_PROMPT_TOKENS = 112
MIN_BODY_TOKENS = 20
MAX_BODY_TOKENS = 48
MIN_BODY_LINES = 2
HELD_OUT_PAIRS = 600
# one large module must not become most of the held-out set
_MAX_HELD_OUT_OF_ONE_MODULE = 60
_RESERVE = 1.3
_BODY_CHARACTERS = 500


@dataclass(frozen=True)
class BodyPair:
    """A prompt with a function's own body and one of near-equal length from another module."""

    name: str  # module:function of the prompt and the chosen body
    module: str
    rejected_module: str
    prompt_ids: tuple[int, ...]  # at most 112, BOS first; the function's whole head stands at the end
    chosen_ids: tuple[int, ...]  # 20 to 48 tokens and EOS
    rejected_ids: tuple[int, ...]  # likewise


@dataclass(frozen=True)
class BodyTask:
    """The example's data: every body is chosen once and rejected once, within its own part."""

    tokenizer: PreTrainedTokenizerFast  # trained on the modules of ``train`` alone
    # The two pairs that reject each other stand side by side: in one step, what their bodies have to say of the loss
    # without the prompts cancels. Such matches are in random order.
    train: tuple[BodyPair, ...]
    held_out: tuple[BodyPair, ...]  # of modules that neither the tokenizer nor ``train`` has seen, shuffled


@dataclass(frozen=True)
class _Example:
    function: SourceFunction
    prompt_ids: tuple[int, ...]
    body_ids: tuple[int, ...]


def build_task(library: StandardLibrary, seed: int, held_out_pairs: int = HELD_OUT_PAIRS) -> BodyTask:
    """Split the library by modules, train the tokenizer on one part and pair the bodies of each.

    ``seed`` draws the held-out modules, the pairing and the order.

    Raises:
        FlexdpoError: if the library is too small for that many held-out pairs.
    """
    draw = random.Random(seed)
    functions = _first_of_each_body(library.functions)
    held_out_modules = _draw_held_out_modules(functions, draw, held_out_pairs)
    tokenizer = train_tokenizer(text for module, text in library.texts.items() if module not in held_out_modules)
    examples = _tokenize(tokenizer, functions)
    train = [example for example in examples if example.function.module not in held_out_modules]
    held_out = [example for example in examples if example.function.module in held_out_modules]
    train_pairs, pairs = _pair_up(train, draw), _pair_up(held_out, draw)[:held_out_pairs]
    if len(pairs) < held_out_pairs or len(train_pairs) < len(pairs):
        raise FlexdpoError(
            f"the standard library has {len(examples)} usable functions, too few to hold {held_out_pairs} out; "
            "use a Python with its whole standard library, or train on your own data with --dataset_name"
        )
    draw.shuffle(pairs)
    return BodyTask(tokenizer, tuple(train_pairs), tuple(pairs))


def swap_prompts(pairs: Sequence[BodyPair], seed: int) -> tuple[BodyPair, ...]:
    """Give every pair a stranger's prompt, of another module than its own.

    Each prompt is still used once. A model that judges bodies by the prompt falls to chance on the result.

    Raises:
        FlexdpoError: if one module holds more than half of the pairs.
    """
    sources = random.Random(seed).sample(range(len(pairs)), len(pairs))

    def fits(place: int, source: int) -> bool:
        return pairs[source].module != pairs[place].module

    for place in range(len(pairs)):
        if not fits(place, sources[place]):
            other = next((k for k in range(len(pairs)) if fits(place, sources[k]) and fits(k, sources[place])), None)
            if other is None:
                raise FlexdpoError(f"{pairs[place].module} holds more than half of the {len(pairs)} pairs")
            sources[place], sources[other] = sources[other], sources[place]
    return tuple(replace(pair, prompt_ids=pairs[k].prompt_ids) for pair, k in zip(pairs, sources, strict=True))


def longer_is_chosen(pairs: Sequence[BodyPair]) -> float:
    """Share of pairs that the rule "the longer body is the right one" decides rightly; a tie counts half."""
    gaps = [len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs]
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)


def as_dataset(pairs: Sequence[BodyPair]) -> Dataset:
    """The pairs as a tokenised preference dataset, as :class:`~flexdpo.training.trainer.DPOTrainer` takes it."""
    return _dataset([(pair.prompt_ids, [pair.chosen_ids, pair.rejected_ids]) for pair in pairs], [[0, 1]])


def as_warm_up_dataset(pairs: Sequence[BodyPair]) -> Dataset:
    """Prompts with their own bodies as plain text to learn: BOS is the prompt, all that follows the response."""
    return _dataset([(pair.prompt_ids[:1], [pair.prompt_ids[1:] + pair.chosen_ids]) for pair in pairs], [])


def _dataset(groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]], edges: list[list[int]]) -> Dataset:
    from datasets import Dataset

    prompts, responses = zip(*groups, strict=True)
    columns = {"prompt_ids": prompts, "response_ids": responses, "edges": [edges] * len(groups)}
    return Dataset.from_dict({**columns, "row": range(len(groups))})


def _first_of_each_body(functions: Iterable[SourceFunction]) -> list[SourceFunction]:
    """Drop every repetition of a body."""
    return list({function.body: function for function in reversed(list(functions))}.values())[::-1]


def _draw_held_out_modules(functions: list[SourceFunction], draw: random.Random, pairs: int) -> frozenset[str]:
    """Draw modules until their functions are surely enough for ``pairs`` pairs."""
    # tokens are not known before the tokenizer is trained on the other modules: a body that looks long enough may
    # still be too short, hence the reserve
    likely = Counter(
        function.module for function in functions if len(function.body) >= 80 and function.uses_parameter(function.body)
    )
    modules = sorted(module for module, count in likely.items() if count <= _MAX_HELD_OUT_OF_ONE_MODULE)
    draw.shuffle(modules)
    held_out: list[str] = []
    found = 0
    while modules and found < _RESERVE * pairs:
        held_out.append(modules.pop())
        found += likely[held_out[-1]]
    return frozenset(held_out)


def _tokenize(tokenizer: PreTrainedTokenizerFast, functions: list[SourceFunction]) -> list[_Example]:
    """Tokenise every function and leave out those whose head is too long or whose body does not fit the task."""
    backend = tokenizer.backend_tokenizer
    newlines = {i for token, i in tokenizer.get_vocab().items() if tokenizer.decode([i]).endswith("\n")}

    def ids_of(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    bodies = ids_of([function.body[:_BODY_CHARACTERS] for function in functions])
    cut = [_cut_body(*parts, newlines) for parts in zip(functions, bodies, strict=True)]
    # bodies that differ later on may begin alike: the first is kept, so that no held-out body was trained on
    first = {tuple(body): function for function, body in reversed(list(zip(functions, cut, strict=True))) if body}
    usable = list(first.items())[::-1]
    heads = ids_of([function.head for _, function in usable])
    contexts = ids_of([function.context for _, function in usable])
    return [
        _Example(
            function,
            (tokenizer.bos_token_id, *(context + head)[1 - MAX_PROMPT_TOKENS :]),
            (*body, tokenizer.eos_token_id),
        )
        for (body, function), head, context in zip(usable, heads, contexts, strict=True)
        # the head names the parameters: an example whose head is cut is hardly solvable
        if len(head) < MAX_PROMPT_TOKENS
    ]


def _cut_body(function: SourceFunction, body_ids: list[int], newlines: set[int]) -> list[int]:
    """Keep the whole lines that fit into 48 tokens; empty where they are too few or use no parameter."""
    ends = [k + 1 for k, token in enumerate(body_ids[:MAX_BODY_TOKENS]) if token in newlines]
    if len(ends) < MIN_BODY_LINES or ends[-1] < MIN_BODY_TOKENS:
        return []
    lines = function.body.split("\n")[: len(ends)]
    return body_ids[: ends[-1]] if function.uses_parameter("\n".join(lines)) else []


def _pair_up(examples: list[_Example], draw: random.Random) -> list[BodyPair]:
    """Match bodies of (nearly) equal length two by two; the two of a match reject each other.

    Every body is thus chosen once and rejected once by the same opponent, so any rule that looks at the two bodies
    alone is right on exactly half of the pairs. With an odd number of examples one is left out. A match's two pairs
    stand side by side in the result, the matches in random order.
    """
    waiting = sorted(examples, key=lambda example: (len(example.body_ids), draw.random()))
    matches: list[tuple[_Example, _Example]] = []
    while len(waiting) > 1:
        first = waiting.pop()
        others = (k for k in reversed(range(len(waiting))) if waiting[k].function.module != first.function.module)
        opponent = next(others, None)
        if opponent is None:
            break  # only one module is left over
        matches.append((first, waiting.pop(opponent)))
    draw.shuffle(matches)
    return [_pair(*ends) for first, second in matches for ends in ((first, second), (second, first))]


def _pair(own: _Example, other: _Example) -> BodyPair:
    module = own.function.module
    name, rejected_module = f"{module}:{own.function.name}", other.function.module
    return BodyPair(name, module, rejected_module, own.prompt_ids, own.body_ids, other.body_ids)
