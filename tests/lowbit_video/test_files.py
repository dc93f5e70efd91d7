"""Files appear whole or not at all; JSON that cannot be read is named."""
import os

import pytest

from lowbit_video import files
from lowbit_video.files import read_json, write_folder_whole, write_json, write_whole


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


def tree(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def fill(folder, text):
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / text).write_text(text)
    (folder / "index").write_text(text)


def test_a_folder_appears_when_it_is_complete_and_replaces_what_has_its_names(tmp_path):
    folder = tmp_path / "deep" / "model"
    with write_folder_whole(folder) as temporary:
        fill(temporary, "old")
        assert not (folder / "index").exists()
    assert tree(folder) == {"a/old": "old", "b/old": "old", "index": "old"}
    (folder / "README.md").write_text("mine")
    with write_folder_whole(folder) as temporary:
        fill(temporary, "new")
    assert tree(folder) == {"README.md": "mine", "a/new": "new", "b/new": "new", "index": "new"}
    with pytest.raises(NotADirectoryError, match="index is a file; give a folder"):
        with write_folder_whole(folder / "index"):
            pass


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left_of_a_folder(tmp_path, error):
    with pytest.raises(error), write_folder_whole(tmp_path / "model") as temporary:
        fill(temporary, "half")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moves", range(6))
def test_an_error_while_a_folder_is_put_in_place_takes_all_back(tmp_path, monkeypatch, moves):
    fill(tmp_path, "old")
    done, move = [], os.replace

    def full_disk(source, target):
        done.append(source)
        if len(done) == moves + 1:
            raise OSError("no space")
        move(source, target)

    with pytest.raises(OSError, match="no space"), write_folder_whole(tmp_path) as temporary:
        fill(temporary, "new")
        monkeypatch.setattr(files.os, "replace", full_disk)
    assert tree(tmp_path) == {"a/old": "old", "b/old": "old", "index": "old"}


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
