"""What a path names: a folder here, or a hub id, of which no more is fetched than is read."""
import fnmatch
import json
import shutil
import sys
import types

import pytest

from lowbit_video import pipelines
from lowbit_video.app.run_pipeline import resolve_dtype
from lowbit_video.pipelines import CogVideoXPipeline
from lowbit_video.pipelines.shared.folders import find_folder

from golden_cases import GOLDENS

WEIGHTS = {"text_encoder": "model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


class Hub(types.ModuleType):
    """huggingface_hub with one repository: the tiny pipeline, with files beside it that nobody reads."""

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.repository, self.copy, self.error = folder / "repository", folder / "copy", None
        shutil.copytree(GOLDENS / "pipeline_2b", self.repository)
        for name in ("README.md", "video.safetensors", "transformer/diffusion_pytorch_model.bf16.safetensors",
                     "transformer/diffusion_pytorch_model.bf16-00001-of-00002.safetensors", "vae/old.bin", "other/config.json"):
            (self.repository / name).parent.mkdir(exist_ok=True)
            (self.repository / name).write_text("not read")

    def add_variant(self, part, variant):
        stem = WEIGHTS[part]
        shutil.copy(self.repository / part / f"{stem}.safetensors", self.repository / part / f"{stem}.{variant}.safetensors")

    def snapshot_download(self, name, allow_patterns):
        assert name == "someone/cogvideox"
        if self.error:
            raise self.error
        for path in self.repository.rglob("*"):
            name = path.relative_to(self.repository)
            if path.is_file() and any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.copy / name)
        return str(self.copy)

    def fetched(self):
        return {str(path.relative_to(self.copy)) for path in self.copy.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def files_of(*parts):
    folder = GOLDENS / "pipeline_2b"
    return {str(path.relative_to(folder)) for part in parts for path in (folder / part).iterdir()} | {"model_index.json"}


@pytest.mark.parametrize("load", [pipelines.load, CogVideoXPipeline.from_pretrained])
def test_what_is_read_is_fetched_and_nothing_else(hub, load):
    assert load("someone/cogvideox", device="cpu").transformer is not None
    assert hub.fetched() == files_of("scheduler", "text_encoder", "tokenizer", "transformer", "vae")


@pytest.mark.parametrize("load", [pipelines.load, CogVideoXPipeline.from_pretrained])
def test_parts_that_are_replaced_or_left_out_are_not_fetched(hub, load):
    part = object()
    pipe = load("someone/cogvideox", device="cpu", text_encoder=None, tokenizer=None, vae=part)
    assert pipe.text_encoder is None and pipe.tokenizer is None and pipe.vae is part
    assert hub.fetched() == files_of("scheduler", "transformer")


def test_of_a_variant_its_weights_are_fetched_and_others_where_a_part_has_none(hub):
    for part in ("text_encoder", "transformer"):
        hub.add_variant(part, "fp16")
    with pytest.warns(UserWarning, match="vae has no weights of variant 'fp16'"):
        CogVideoXPipeline.from_pretrained("someone/cogvideox", device="cpu", variant="fp16")
    fetched = {name for name in hub.fetched() if name.endswith(".safetensors")}
    assert fetched == {"text_encoder/model.fp16.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
                       "vae/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize("rotary, dtype", [(True, "bfloat16"), (False, "float16")])
def test_the_published_dtype_is_read_of_a_hub_id_too(hub, rotary, dtype):
    config = hub.repository / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rotary_positional_embeddings": rotary}))
    assert resolve_dtype("auto", "gpu:0", "someone/cogvideox") == dtype
    assert hub.fetched() == {"model_index.json", "transformer/config.json"}
    assert resolve_dtype("float32", "gpu:0", "nowhere/at-all") == resolve_dtype("auto", "cpu", "nowhere/at-all") == "float32"


def test_shards_are_fetched(hub):
    pipe = CogVideoXPipeline.from_pretrained(GOLDENS / "pipeline_2b", device="cpu")
    shutil.rmtree(hub.repository / "transformer")
    pipe.transformer.save_pretrained(hub.repository / "transformer", max_shard_size=20000)
    shards = {f"transformer/{path.name}" for path in (hub.repository / "transformer").iterdir()}
    assert len(shards) > 3
    CogVideoXPipeline.from_pretrained("someone/cogvideox", device="cpu")
    assert shards <= hub.fetched()


def test_a_class_that_is_not_there_is_refused_before_its_parts_are_fetched(hub):
    index = hub.repository / "model_index.json"
    index.write_text(index.read_text().replace("CogVideoXPipeline", "WanPipeline"))
    for load in (pipelines.load, CogVideoXPipeline.from_pretrained):
        with pytest.raises(ValueError, match="describes a WanPipeline, expected a CogVideoXPipeline"):
            load("someone/cogvideox")
    assert hub.fetched() == {"model_index.json"}


@pytest.mark.parametrize("error", [OSError("Got: ConnectError\nAn error happened"), RuntimeError("401 Client Error")])
def test_what_the_hub_says_becomes_one_line(hub, error):
    hub.error = error
    words = r"is not a folder here, and the Hugging Face Hub did not give it \(.*(ConnectError|401).*\); check the name and the"
    with pytest.raises(FileNotFoundError, match=f"someone/cogvideox {words} network") as raised:
        pipelines.load("someone/cogvideox")
    assert "\n" not in str(raised.value) and raised.value.__cause__ is error


def test_a_typo_in_a_folders_name_asks_no_hub(hub, tmp_path, monkeypatch):
    hub.error = AssertionError("asked")
    for name in ("CogVideoX-2b", "CogVideoX-5b", "other", ".hidden"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "weights.safetensors").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path, words in (("models/CogVideo-2b", r"models has CogVideoX-2b, CogVideoX-5b\. If .*snapshot_download\('models"),
                        ("models/nothing", "models has CogVideoX-2b, CogVideoX-5b, other"),
                        ("./models/nothing", "models has CogVideoX-2b"), ("~/models/CogVideox-2b", "models has CogVideoX-2b"),
                        (tmp_path / "modles" / "x", "has the form owner/name"), ("modles", "the current folder has models"),
                        ("models/weights.safetensors", "which is a file; give the folder that has model_index.json")):
        with pytest.raises(FileNotFoundError, match=f"no such folder: .*{words}"):
            find_folder(path)
    assert find_folder("~/models/CogVideoX-2b") == str(tmp_path / "models" / "CogVideoX-2b")
