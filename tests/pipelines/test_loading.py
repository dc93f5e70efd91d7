"""`pipelines.load`: the class is chosen by model_index.json."""
import json
import shutil

import pytest

from lowbit_video import pipelines
from lowbit_video.pipelines import loading
from lowbit_video.pipelines.shared.config import ConfigError

from golden_cases import GOLDENS


def test_the_class_is_the_one_that_the_index_names(tmp_path, monkeypatch):
    pipe = pipelines.load(GOLDENS / "pipeline_2b", device="cpu")
    assert type(pipe) is pipelines.CogVideoXPipeline and pipe.device == "cpu"

    class Wan:
        @classmethod
        def from_pretrained(cls, folder, **options):
            return folder, options

    monkeypatch.setitem(loading.PIPELINES, "Wan", ".shared.output")
    monkeypatch.setattr("lowbit_video.pipelines.shared.output.Wan", Wan, raising=False)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Wan"}))
    assert pipelines.load(tmp_path, dtype="float16") == (str(tmp_path), {"dtype": "float16"})


def test_another_class_is_named_with_those_there_are(tmp_path):
    shutil.copy(GOLDENS / "pipeline_2b" / "model_index.json", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanPipeline"}))
    with pytest.raises(ConfigError, match="model_index.json describes a WanPipeline, expected a CogVideoXPipeline"):
        pipelines.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pipelines.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it has no model_index.json"):
        (tmp_path / "model_index.json").unlink()
        pipelines.load(tmp_path)
