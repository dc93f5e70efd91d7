"""Where results go is tried before the work."""
import pytest

from lowbit_video.app import cli


@pytest.mark.parametrize("command", [
    ["eval", "layers", "--model", "none", "--prompt", "a cat", "--out", "{file}/layers.npz"],
    ["bench", "kernels", "--out", "{file}/bench"],
    ["bench", "tune", "--out", "{file}/tuning.json"],
], ids=lambda words: " ".join(words[:2]))
def test_a_folder_that_cannot_be_written_is_known_before_the_work(tmp_path, capsys, command):
    (tmp_path / "file").write_text("")
    assert cli.main([word.format(file=tmp_path / "file") for word in command]) == 2
    assert "cannot write into" in capsys.readouterr().err
