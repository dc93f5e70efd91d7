"""generation.json: our names for its keys, what is not ours, and files that are none."""
import json

import pytest

from lowbit_video.pipelines.shared.generation import read_generation, read_stored


def test_keys_are_read_by_our_names_and_others_are_left_alone(tmp_path):
    assert read_generation(tmp_path) == read_stored(tmp_path) == {}
    stored = {"num_inference_steps": 25, "steps": 9, "guidance": 0, "guidance_scale": 3.0, "num_frames": 33, "frames": None,
              "height": None, "fps": 8, "world": "shapes", "max_sequence_length": 32}
    (tmp_path / "generation.json").write_text(json.dumps(stored))
    assert read_generation(tmp_path) == {"steps": 9, "guidance": 0, "frames": 33, "fps": 8, "world": "shapes"}
    assert read_stored(tmp_path) == stored


@pytest.mark.parametrize("text, message", [
    ("{", "generation.json is not valid JSON: .*; correct it or remove it"),
    ("[]", "generation.json holds list, expected a JSON object; correct it or remove it")])
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, message):
    (tmp_path / "generation.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_generation(tmp_path)
