"""Files appear whole or not at all; JSON that cannot be read is named."""
import os

import pytest

from lowbit_video.files import read_json, write_json, write_whole


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("old")
    with write_whole(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".mp4"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error):
        with write_whole(path) as temporary:
            temporary.write_text("half")
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_json_is_read_as_written_and_what_is_none_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "ä"})
    assert read_json(path) == {"b": 1, "a": "ä"} and path.read_text() == '{\n "b": 1,\n "a": "\\u00e4"\n}\n'
    path.write_text('{"a": 1}', encoding="utf-8-sig")  # as Windows' editors write it
    assert read_json(path) == {"a": 1}
    for text, message in (("{", "a.json is not valid JSON: "), ("[]", "a.json holds list, expected a JSON object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    with pytest.raises(LookupError, match="no such file: "):
        read_json(tmp_path / "b.json", error=LookupError)
