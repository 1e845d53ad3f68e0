"""Images of prompts from the columns, as TRL reads them, to tokens and rows; what cannot be read is one error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature

from flexdpo import FlexdpoError, Row
from flexdpo.data.draft import IMAGE_CUT, IMAGES_COLUMN
from flexdpo.data.load import load_preference_dataset
from flexdpo.data.mixture import Mixture, Part
from flexdpo.data.regroup import regroup_by_prompt
from flexdpo.data.stream import StreamedPreferences
from flexdpo.data.tokenize import group_from_row, tokenize_preferences
from tests.conftest import word_tokenizer
from tests.images import processors
from tests.images.processors import picture

PROCESSOR = processors.llava_processor()
IMAGE = PROCESSOR.image_token_id


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def row(prompt: Any = None, **columns: Any) -> dict[str, Any]:
    answers = {name: [{"role": "assistant", "content": name}] for name in ("w11", "w12")}
    prompt = user("w5 w6") if prompt is None else prompt
    return {"prompt": prompt, "chosen": answers["w11"], "rejected": answers["w12"], **columns}


def tokenised(rows: list[dict[str, Any]], **settings: Any) -> Any:
    return tokenize_preferences(Dataset.from_list(rows), PROCESSOR, **{"max_length": None, **settings})


def streamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    source = IterableDataset.from_generator(lambda: iter(rows))
    return list(StreamedPreferences(source, PROCESSOR, max_length=None, endless=False))


def as_bytes(seed: int) -> bytes:
    held = io.BytesIO()
    picture(seed).save(held, "PNG")
    return held.getvalue()


def test_every_way_to_hold_an_image_is_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(as_bytes(1))
    ways: list[dict[str, Any]] = [
        {"images": [str(path)]},
        {"image": str(path)},
        {"images": [picture(1)]},
        {"image": picture(1)},
        {"images": [as_bytes(1)]},
        {"images": [{"bytes": as_bytes(1), "path": None}]},
        {"images": [{"bytes": None, "path": str(path)}]},
    ]
    each = [found for way in ways for found in (tokenised([row(**way)]).dataset[0], streamed([row(**way)])[0])]
    in_a_part = user([{"type": "image", "image": str(path)}, {"type": "text", "text": "w5 w6"}])
    each.append(tokenised([row(in_a_part)]).dataset[0])
    features = Dataset.from_list([row(images=[str(path)])]).cast_column("images", [ImageFeature()])
    each.append(tokenize_preferences(features, PROCESSOR, max_length=None).dataset[0])
    [ids] = {tuple(found["prompt_ids"]) for found in each}
    [digest] = {found[IMAGES_COLUMN][0]["digest"] for found in each}
    # turn, image, text, end of the turn, the answer's
    assert ids == (3, *[IMAGE] * 4, 5, 6, 4, 3)
    # a path is remembered as such, bytes travel in the row
    assert {found[IMAGES_COLUMN][0]["path"] for found in each} == {None, str(path)}
    rows = Row.from_groups([group_from_row(found) for found in each])
    assert rows.layout.images is not None
    assert rows.layout.images.counts == (4,)
    assert digest != tokenised([row(images=[picture(2)])]).dataset[0][IMAGES_COLUMN][0]["digest"]


def test_images_stand_where_the_messages_have_them() -> None:
    parts = [{"type": "text", "text": "w5"}, {"type": "image"}, {"type": "text", "text": "w6"}, {"type": "image"}]
    turns = [*user("w5"), {"role": "assistant", "content": "w7"}, *user("w8")]
    in_parts, in_turns = (
        tokenised([row(user(parts), images=[picture(1), picture(2)])]),
        tokenised([row(turns, images=[picture(1), picture(2)])]),
    )
    image = [IMAGE] * 4
    assert in_parts.dataset[0]["prompt_ids"] == [3, 5, *image, 6, *image, 4, 3]
    # all before the text of the first turn
    assert in_turns.dataset[0]["prompt_ids"] == [3, *image, *image, 5, 4, 3, 7, 2, 4, 3, 8, 4, 3]
    digests = [[i["digest"] for i in found.dataset[0][IMAGES_COLUMN]] for found in (in_parts, in_turns)]
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[0][1]


def test_whole_conversations_and_text() -> None:
    whole = [*user([{"type": "image"}, {"type": "text", "text": "w5 w6"}])]
    answers = {
        column: [*whole, {"role": "assistant", "content": [{"type": "text", "text": word}]}]
        for column, word in (("chosen", "w11"), ("rejected", "w12"))
    }
    found = tokenised([{**answers, "images": [picture(1)]}]).dataset[0]
    want = tokenised([row(images=[picture(1)])]).dataset[0]
    assert (found["prompt_ids"], found["response_ids"]) == (want["prompt_ids"], want["response_ids"])
    text = {"prompt": "w5 <image> w6", "chosen": "w11", "rejected": "w12 </s>", "image": picture(1)}
    found = tokenised([text]).dataset[0]
    assert found["prompt_ids"] == [5, *[IMAGE] * 4, 6]
    assert found["response_ids"] == [[11, 2], [12, 2]]


def test_rows_without_images_among_others() -> None:
    found = tokenised([row(images=[]), row(images=[picture(1)]), row(images=None)])
    assert [len(images) for images in found.dataset[IMAGES_COLUMN]] == [0, 1, 0]
    assert found.dataset[0]["prompt_ids"] == [3, 5, 6, 4, 3]
    assert "not read" not in found.report.summary()
    text = tokenize_preferences(Dataset.from_list([row()]), PROCESSOR, max_length=None)
    assert text.dataset[0]["prompt_ids"] == [3, 5, 6, 4, 3]
    both = Mixture((Part("a", Dataset.from_list([row(images=[picture(1)])])), Part("b", Dataset.from_list([row()]))))
    assert [len(r[IMAGES_COLUMN] or ()) for r in tokenize_preferences(both, PROCESSOR, max_length=None).dataset] == [
        1,
        0,
    ]


def test_an_image_that_would_be_cut_is_counted_and_its_row_left_out() -> None:
    rows = [row(images=[picture(1)]), row(images=[]), row(images=[picture(2)] * 2), row(user("w5 " * 9), images=[])]
    found = tokenised(rows, max_length=8)
    # 4 tokens of the second image would be gone; the prompt of the last alone is too long
    assert found.report.skipped == {IMAGE_CUT: 1, "prompt alone fills max_length": 2}
    assert [r["row"] for r in found.dataset] == [1]
    # cut on the left: what is left of the first is text alone, and of the third an image and a half
    found = tokenised(rows, max_length=None, max_prompt_length=9)
    assert found.report.skipped == {IMAGE_CUT: 1}
    assert found.dataset[0]["prompt_ids"].count(IMAGE) == 4
    assert tokenised(rows, max_prompt_length=5).report.skipped == {IMAGE_CUT: 2}


def test_equal_prompts_with_other_images_are_other_prompts() -> None:
    found = tokenised([row(images=[picture(n)]) for n in (1, 2, 1)])
    assert len({tuple(r["prompt_ids"]) for r in found.dataset}) == 1
    regrouped = regroup_by_prompt(found.dataset)
    assert regrouped["source_rows"] == [[0, 2], [1]]
    assert [r["prompt_images"][0]["digest"] for r in regrouped] == [
        found.dataset[n][IMAGES_COLUMN][0]["digest"] for n in (0, 1)
    ]


def test_paths_begin_at_the_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = processors.written_rows(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for name in (file, file.parent):
        for streaming in (False, True):
            rows = list(load_preference_dataset(str(name), streaming=streaming))
            assert rows[5]["images"] == [str(tmp_path / "data" / "pictures" / "1.png")]


def test_tokens_are_kept_for_the_pictures_that_they_were_made_of(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    picture(1).save(path)
    rows = [row(images=[str(path)])]
    first = tokenised(rows).dataset
    assert tokenised(rows).dataset[0] == first[0]
    picture(2).save(path)
    with pytest.raises(FlexdpoError, match=r"row 0: .*one.png is not what it was when the data were tokenised"):
        Row.from_groups([group_from_row(first[0])])
    again = tokenised(rows).dataset
    assert again[0][IMAGES_COLUMN][0]["digest"] != first[0][IMAGES_COLUMN][0]["digest"]
    Row.from_groups([group_from_row(again[0])])


def test_an_image_lies_as_its_file_says(tmp_path: Path) -> None:
    turned = picture(1, 24, 30)
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = turned.rotate(-90, expand=True)
    digests = {
        tokenised([row(images=[image])]).dataset[0][IMAGES_COLUMN][0]["digest"]
        for image in (str(tmp_path / "turned.png"), (tmp_path / "turned.png").read_bytes(), upright)
    }
    assert len(digests) == 1


_PART = [{"type": "image"}, {"type": "text", "text": "w5"}]
_SAYS_SO = [{"role": "assistant", "content": "w6 <image>"}]
_SOUND = user([{"type": "audio"}, {"type": "text", "text": "w5"}])
_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": (row(images=["nowhere/a.png"]), r"row 0 .*there is no file .*nowhere/a\.png; relative paths"),
    "damaged": (row(images=[as_bytes(1)[:60]]), "row 0 .*its bytes cannot be read as a picture"),
    "no picture": (row(images=[b"text"]), "row 0 .*its bytes cannot be read as a picture"),
    "a URL": (row(images=["https://example.org/a.png"]), "is a URL, and nothing is downloaded"),
    "data in a URL": (row(images=["data:image/png;base64,AAAA"]), "is a URL"),
    "a number": (row(images=[7]), "expected a path, bytes, a PIL image .* found int"),
    "more images than places": (row(user(_PART), images=[picture(1)] * 2), "2 images and 1 part {'type': 'image'}"),
    "more places than images": (row(user(_PART), images=[]), "0 images and 1 part {'type': 'image'}"),
    "a place in the text": (row(user("<image> w5"), images=[picture(1)]), "1 image and 2 placeholders '<image>'"),
    "text without a place": (
        {"prompt": "w5", "chosen": "w6", "rejected": "w7", "images": [picture(1)]},
        "1 image and 0 placeholders '<image>'",
    ),
    "in a response": (
        row(images=[], chosen=[{"role": "assistant", "content": _PART}]),
        "row 0 .*column 'chosen': an image in a response",
    ),
    "a response that says so": (
        row(images=[picture(1)], rejected=_SAYS_SO),
        "column 'rejected': an image in a response, as '<image>'",
    ),
    "video": (row(images=[picture(1)], videos=["a.mp4"]), "column 'videos': sound and video are not supported"),
    "audio": (row(_SOUND, images=[]), "found dict .*sound and video are not supported"),
}


@pytest.mark.parametrize("case", _BAD)
def test_what_cannot_be_read_is_one_error(case: str) -> None:
    held, message = _BAD[case]
    with pytest.raises(FlexdpoError, match=message):
        streamed([held])


def test_a_processor_that_needs_the_whole_prompt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would make other things of an image beside another one."""
    processor = processors.llava_processor()
    plain = type(processor.image_processor).__call__

    def scaled(self: Any, images: Any, **kwargs: Any) -> Any:
        found = plain(self, images, **kwargs)
        found["pixel_values"] = found["pixel_values"] * len(images[0])
        return found

    monkeypatch.setattr(type(processor.image_processor), "__call__", scaled)
    rows = Dataset.from_list([row(images=[picture(1), picture(2)])])
    with pytest.raises(FlexdpoError, match="makes other things of its 2 images together than of each alone"):
        tokenize_preferences(rows, processor, max_length=None)


def test_images_need_a_processor_and_the_same_one() -> None:
    rows = Dataset.from_list([row(images=[picture(1)])])
    with pytest.raises(FlexdpoError, match="images are read by a processor, and here is a tokenizer alone"):
        tokenize_preferences(rows, word_tokenizer(), max_length=None)
    with pytest.raises(FlexdpoError, match="images are read by a processor"):
        tokenize_preferences(
            Dataset.from_list([row(user([{"type": "image", "path": "a.png"}]))]), word_tokenizer(), max_length=None
        )
    found = tokenised([row(images=[picture(1)])]).dataset[0]
    found[IMAGES_COLUMN][0]["processor"] = "another"
    with pytest.raises(FlexdpoError, match="tokenised with a processor that is not here"):
        Row.from_groups([group_from_row(found)])


def test_rows_of_ids_keep_their_images() -> None:
    found = tokenised([row(images=[picture(1)]), row(images=[])]).dataset
    again = tokenize_preferences(found, PROCESSOR, max_length=9).dataset
    # the prompt with the image alone fills that
    assert [r["row"] for r in again] == [1]
    assert json.dumps(again[0][IMAGES_COLUMN]) == "[]"
