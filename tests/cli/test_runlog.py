"""Files that are whole or absent, whoever else writes them."""

import os

from asarm.runlog import create_json, prepare_output_dir, write_atomic


def meanwhile(monkeypatch, name: str, other) -> None:
    """Let ``other`` happen once, just before this process's next ``os.name`` takes effect."""
    real = getattr(os, name)

    def late(*arguments):
        monkeypatch.setattr(os, name, real)
        other()
        return real(*arguments)

    monkeypatch.setattr(os, name, late)


def test_two_writers_of_the_same_number_do_not_share_a_partial_file(tmp_path, monkeypatch):
    """As two machines' processes may have it: the last to finish is the one that is read, and neither fails."""
    path, plain = tmp_path / "config.yaml", tmp_path / "plain"
    meanwhile(monkeypatch, "replace", lambda: write_atomic(path, "theirs"))
    write_atomic(path, "ours")
    plain.write_text("")
    assert path.read_text() == "ours"
    assert path.stat().st_mode == plain.stat().st_mode, "others may read it as any file"
    assert sorted(tmp_path.iterdir()) == [path, plain]


def test_two_probes_of_a_folder_do_not_share_a_file(tmp_path, monkeypatch):
    meanwhile(monkeypatch, "unlink", lambda: prepare_output_dir(str(tmp_path)))
    assert prepare_output_dir(str(tmp_path)) == tmp_path
    assert not list(tmp_path.iterdir())


def test_a_file_is_created_once(tmp_path, monkeypatch):
    path, told = tmp_path / "it.json", []
    meanwhile(monkeypatch, "link", lambda: told.append(create_json(path, "theirs")))
    assert (create_json(path, "ours"), told) == (False, [True])
    assert path.read_text() == '"theirs"\n' and list(tmp_path.iterdir()) == [path]
