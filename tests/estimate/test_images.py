"""Images in what a dataset costs and in what a row looks like: counted as the trainer counts, and nothing is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from flexdpo.cli import main
from flexdpo.data.tokenize import group_from_row, tokenize_preferences
from flexdpo.estimate.estimate import estimate_dataset
from flexdpo.estimate.settings import EstimateSettings
from flexdpo.layout.packing import pack
from flexdpo.show.mask_image import IMAGE, PROMPT, token_kinds
from flexdpo.show.packing import batch_layouts
from flexdpo.show.text import overview_text
from tests.images import processors

SETTINGS = EstimateSettings(device="cpu", max_length=None, per_device_train_batch_size=5)


def test_images_are_counted_and_never_merged() -> None:
    rows, processor = Dataset.from_list(processors.in_parts(processors.rows())), processors.llava_processor()
    found = estimate_dataset(rows, processor, SETTINGS, model=processors.llava_model().config)
    images = found.images
    assert images is not None
    assert (images.encoded, images.unshared, images.tokens) == (5, 10, 20)
    # a picture of 28 pixels squared is four patches
    assert images.flops == 2 * 4 * found.model.tower
    assert "images: 5 encoded in an epoch where an ordinary run encodes 10" in found.table()
    # two prompts differ in the image alone
    assert found.repeated.rows == 0
    alike = estimate_dataset(Dataset.from_list([*rows, rows[0]]), processor, SETTINGS)
    assert (alike.repeated.prompts, alike.repeated.rows) == (1, 2)
    text = estimate_dataset(rows.remove_columns("images").select([3]), processor, SETTINGS)
    assert text.images is None


def test_image_tokens_are_drawn_as_such() -> None:
    rows = Dataset.from_list(processors.in_parts(processors.rows()))
    tokenised = tokenize_preferences(rows, processors.llava_processor(), max_length=None)
    groups = [group_from_row(row) for row in tokenised.dataset]
    [row] = pack(groups)
    kinds = token_kinds(row).kinds
    image = row.input_ids[0].numpy() == processors.VOCABULARY
    assert ((kinds == IMAGE) == image).all()
    assert int(image.sum()) == 20
    assert kinds[0] == PROMPT
    layouts = batch_layouts(groups)
    # of each sequence in the ordinary batch too
    assert sum(int((lane.kinds == IMAGE).sum()) for lane in layouts[0].lanes) == 40
    told = overview_text(row, layouts)
    assert "image, 4 tokens" in told
    assert "▓" in told


def test_the_commands_take_a_file_with_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tmp_path / "model", processors.written_rows(tmp_path / "data", 6)
    processors.llava_model().config.save_pretrained(model)
    processors.llava_processor().save_pretrained(model)
    assert main(["estimate", str(file), "--model", str(model), "--device", "cpu"]) == 0
    assert "images: 6 encoded in an epoch where an ordinary run encodes 12" in capsys.readouterr().out
    assert main(["show", str(file), "--model", str(model), "--text"]) == 0
    assert "image, 4 tokens" in capsys.readouterr().out
    words = f"train --model_name_or_path {model} --dataset_name {file} --output_dir {tmp_path / 'out'} --dry_run"
    assert main([*words.split(), "--report_to", "none"]) == 0
    assert "images: 6 encoded" in capsys.readouterr().out
